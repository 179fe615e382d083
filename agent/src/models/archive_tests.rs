//! Models that are archives on a web server, good ones and hostile ones.

use std::io::Write as _;

use axum::{Router, body::Bytes, routing::any};

use super::*;

async fn serve(content: Vec<u8>, name: &str) -> String {
    let content = Bytes::from(content);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(any(move || std::future::ready(content.clone())));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}/m/{name}?token=1")
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        // The library itself does not write names that leave the folder.
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in files {
        writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

async fn fetch(
    directory: &tempfile::TempDir,
    budget: u64,
    content: Vec<u8>,
    name: &str,
) -> Result<PathBuf, ModelError> {
    let uri = serve(content, name).await;
    let root = directory.path().join("cache");
    let models = Models::open(root, BTreeMap::new(), Duration::from_secs(30), Some(budget)).unwrap();
    models.ensure(&uri, &Credentials::new(), |_| {}).await
}

const FILES: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("w/model.bin", b"weights weights weights")];

#[tokio::test]
async fn archives_are_unpacked() {
    let plain = tar(&FILES);
    for (name, content) in
        [("m.tar", plain.clone()), ("m.tgz", gzip(&plain)), ("m.tar.gz", gzip(&plain)), ("m.zip", zip(&FILES))]
    {
        let directory = tempfile::tempdir().unwrap();
        let folder = fetch(&directory, 1 << 20, content, name).await.unwrap();
        for (path, content) in FILES {
            assert_eq!(std::fs::read(folder.join(path)).unwrap(), content, "{name}");
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "{name}: the archive itself is not there");
        assert_eq!(std::fs::read_dir(directory.path().join("cache/blobs")).unwrap().count(), 2, "{name}");
        assert_eq!(std::fs::read_dir(directory.path().join("cache/partial")).unwrap().count(), 0, "{name}");
    }
}

#[tokio::test]
async fn nothing_is_written_outside_the_folder() {
    let link = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, "w", "/etc").unwrap();
        builder.into_inner().unwrap()
    };
    let truncated = {
        let whole = gzip(&tar(&FILES));
        whole[..whole.len() / 2].to_vec()
    };
    for (name, content, said) in [
        ("m.tar", tar(&[("../../escaped", b"x")]), "without .."),
        ("m.tar", tar(&[("/tmp/escaped", b"x")]), "relative"),
        ("m.zip", zip(&[("a/../../escaped", b"x")]), "without .."),
        ("m.tar", tar(&[("a", b"x"), ("a", b"y")]), "twice"),
        ("m.tar", link, "Symlink are not unpacked"),
        ("m.tgz", truncated, "cannot be unpacked"),
        ("m.zip", b"no archive".to_vec(), "cannot be unpacked"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let error = fetch(&directory, 1 << 20, content, name).await.unwrap_err();
        assert_eq!(error.reason(), "ModelFetchFailed", "{error}");
        assert!(error.to_string().contains(said), "{error}");
        let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["cache"], "{error}");
        for folder in ["trees", "blobs", "partial"] {
            assert_eq!(std::fs::read_dir(directory.path().join("cache").join(folder)).unwrap().count(), 0, "{error}");
        }
    }
}

#[tokio::test]
async fn what_an_archive_unpacks_to_counts_against_the_budget() {
    let directory = tempfile::tempdir().unwrap();
    let zeros = vec![0; 4 << 20];
    let bomb = gzip(&tar(&[("zeros", &zeros)]));
    assert!(bomb.len() < 1 << 20);
    let error = fetch(&directory, 1 << 20, bomb, "m.tgz").await.unwrap_err();
    assert_eq!(error.reason(), "CacheFull", "{error}");
}
