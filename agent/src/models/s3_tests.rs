//! Fetches from a real S3 server, which checks signatures.

use object_store::{ObjectStoreExt as _, aws::AmazonS3Builder};
use pilotlight_tests::s3::{KEY, S3, SECRET};

use super::{plan::RANGE_BYTES, *};

/// By the names that KServe's secrets have.
fn credentials(s3: &S3) -> Credentials {
    let pairs = [
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_REGION", "us-east-1"),
        ("S3_USE_HTTPS", "0"),
        ("S3_ENDPOINT", s3.endpoint().trim_start_matches("http://")),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    Credentials::from(pairs)
}

fn models(directory: &tempfile::TempDir) -> Models {
    Models::open(directory.path().join("cache"), BTreeMap::new(), Duration::from_secs(30), None).unwrap()
}

fn content(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|n| (n % 249) as u8).collect()
}

/// Uploads by the protocol, with a SHA-256 where asked for, so that the server keeps checksums.
async fn upload(s3: &S3, key: &str, content: &[u8], sha256: bool) {
    s3.bucket("store");
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name("store")
        .with_endpoint(s3.endpoint())
        .with_allow_http(true)
        .with_access_key_id(KEY)
        .with_secret_access_key(SECRET);
    if sha256 {
        builder = builder.with_checksum_algorithm(object_store::aws::Checksum::SHA256);
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    builder.build().unwrap().put(&key.into(), content.to_vec().into()).await.unwrap();
}

#[tokio::test]
async fn keys_below_the_prefix_are_files_without_it() {
    let s3 = S3::start().await;
    let weights = content(RANGE_BYTES + 7);
    s3.put("store", "models/m/config.json", b"{}");
    s3.put("store", "models/m/w/model.bin", &weights);
    s3.put("store", "models/m2/other.bin", b"a neighbour");
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    for uri in ["s3://store/models/m", "s3://store/models/m/"] {
        let folder = models.ensure(uri, &credentials(&s3), |_| {}).await.unwrap();
        assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}");
        assert!(std::fs::read(folder.join("w/model.bin")).unwrap() == weights);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "nothing of the neighbour");
    }
    let folder = models.ensure("s3://store/models/m/config.json", &credentials(&s3), |_| {}).await.unwrap();
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}");
    let folder = models.ensure("s3://store", &credentials(&s3), |_| {}).await.unwrap();
    assert_eq!(std::fs::read(folder.join("models/m2/other.bin")).unwrap(), b"a neighbour");
}

#[tokio::test]
async fn what_is_missing_or_refused_is_said() {
    let s3 = S3::start().await;
    s3.put("store", "m/model.bin", b"weights");
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    let failing = async |uri: &str, credentials: &Credentials| {
        let error = models.ensure(uri, credentials, |_| {}).await.unwrap_err();
        (error.reason(), error.to_string())
    };
    let right = credentials(&s3);
    let (reason, said) = failing("s3://store/none", &right).await;
    assert_eq!(reason, "ModelNotFound", "{said}");
    let (reason, said) = failing("s3://none/m", &right).await;
    assert_eq!(reason, "ModelNotFound", "{said}");
    assert!(said.contains("s3://none/m") && said.contains("bucket"), "{said}");
    let mut wrong = right.clone();
    wrong.insert("AWS_SECRET_ACCESS_KEY".to_owned(), "another".to_owned());
    let (reason, said) = failing("s3://store/m", &wrong).await;
    assert_eq!(reason, "ModelFetchFailed");
    assert!(said.contains("refuses these credentials") && !said.contains("another"), "{said}");
    wrong.insert("AWS_ACCESS_KEY_ID".to_owned(), "AKIDUNKNOWN".to_owned());
    assert!(failing("s3://store/m", &wrong).await.1.contains("refuses these credentials"));
    assert!(models.cache().trees().is_empty());
}

#[tokio::test]
async fn a_cut_off_fetch_goes_on_and_equal_content_is_kept_once() {
    let s3 = S3::start().await;
    let weights = content(2 * RANGE_BYTES + 7);
    upload(&s3, "m/model.bin", &weights, true).await;
    upload(&s3, "copy/renamed.bin", &weights, true).await;
    let directory = tempfile::tempdir().unwrap();
    let first = models(&directory);
    let listed = source::open("s3://store/m", &credentials(&s3), &Clients::default()).unwrap().list().await.unwrap();
    let part = first.cache().part(&plan::tree_key("s3://store/m", &listed), 0, listed[0].size).unwrap();
    // As a process leaves it that is killed after its first range.
    std::os::unix::fs::FileExt::write_all_at(&part.data, &weights[..RANGE_BYTES as usize], 0).unwrap();
    part.note(&[0]).unwrap();
    drop((part, first));
    let models = models(&directory);
    let before = s3.ranges();
    let folder = models.ensure("s3://store/m", &credentials(&s3), |_| {}).await.unwrap();
    assert!(std::fs::read(folder.join("model.bin")).unwrap() == weights);
    assert_eq!(s3.ranges() - before, 2, "the first range is not read again");
    // By the SHA-256 that the store gives, it is known to be here before a byte comes.
    let folder = models.ensure("s3://store/copy", &credentials(&s3), |_| {}).await.unwrap();
    assert!(std::fs::read(folder.join("renamed.bin")).unwrap() == weights);
    assert_eq!(s3.ranges() - before, 2, "equal content is not fetched twice");
    assert_eq!(std::fs::read_dir(directory.path().join("cache/blobs")).unwrap().count(), 1);
}

#[tokio::test]
async fn content_that_does_not_match_its_checksum_is_refused() {
    let s3 = S3::start().await;
    upload(&s3, "sha/model.bin", b"weights", true).await;
    upload(&s3, "md5/model.bin", b"weights", false).await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    for (uri, kind) in [("s3://store/sha", "SHA-256"), ("s3://store/md5", "MD5")] {
        let file = s3.file("store", &format!("{}/model.bin", &uri["s3://store/".len()..]));
        // Bits rot behind the server's back.
        std::fs::write(&file, b"weighs!").unwrap();
        let error = models.ensure(uri, &credentials(&s3), |_| {}).await.unwrap_err();
        assert_eq!(error.reason(), "ModelChecksumMismatch", "{error}");
        assert!(error.to_string().contains(&format!("model.bin: {kind} is ")), "{error}");
        assert!(models.cache().trees().is_empty(), "nothing is published");
        assert_eq!(std::fs::read_dir(directory.path().join("cache/blobs")).unwrap().count(), 0);
    }
    std::fs::write(s3.file("store", "sha/model.bin"), b"weights").unwrap();
    models.ensure("s3://store/sha", &credentials(&s3), |_| {}).await.unwrap();
}
