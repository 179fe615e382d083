//! Where models are read from: object stores, web servers and the Hugging Face hub.

use std::{collections::BTreeMap, error::Error, ops::Range, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, RetryConfig,
    aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder,
    client::{HttpError, HttpErrorKind},
    gcp::GoogleCloudStorageBuilder,
    path::Path,
};
use reqwest::{StatusCode, header};
use serde::Deserialize;

use super::{
    ModelError,
    checksum::Checksums,
    clients::{Clients, SeenHeaders},
    plan::Object,
};

/// Bytes of a range, as they come.
pub type Content = BoxStream<'static, Result<Bytes, String>>;
/// Credentials and settings by the names of the tools' own environment variables, such as
/// `AWS_ACCESS_KEY_ID`. Never printed.
pub type Credentials = BTreeMap<String, String>;

/// Longest wait for a connection. All tries of [`retries`] together take less than a fetch waits for a listing
/// ([`super::STALL`]), so that the message names the address that does not answer.
pub(super) const CONNECT_WITHIN: Duration = Duration::from_secs(8);
const HUB: &str = "https://huggingface.co";

/// One place that a model can be read from.
#[async_trait]
pub trait Source: Send + Sync {
    /// Where requests go, for messages, such as `https://storage.googleapis.com`.
    fn address(&self) -> &str;
    /// All files, sorted by path. Empty where nothing is there.
    async fn list(&self) -> Result<Vec<Object>, ModelError>;
    /// Checksums of a file's content, as far as the source knows them beyond the listing.
    async fn checksums(&self, object: &Object) -> Result<Checksums, ModelError> {
        Ok(Checksums::listed(object))
    }
    /// A part of a file, not empty; fails where the file is not any more what was listed.
    async fn read(&self, object: &Object, range: Range<u64>) -> Result<Content, String>;
}

/// Opens the source that an address names.
///
/// # Errors
/// The scheme is not known here, or the credentials cannot be used.
pub fn open(uri: &str, credentials: &Credentials, clients: &Clients) -> Result<Arc<dyn Source>, ModelError> {
    let bad = |reason: String| ModelError::Rejected { uri: uri.to_owned(), reason };
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(bad("is no address; expected s3://, gs://, https://, http://, hf:// or pvc://".to_owned()));
    };
    let (first, path) = rest.split_once('/').unwrap_or((rest, ""));
    if scheme.starts_with("http") {
        clients.check(uri).map_err(bad)?;
    }
    // Whoever may apply a manifest may name an endpoint in a secret, too.
    for (name, endpoint) in credentials.iter().filter(|(name, _)| name.to_ascii_uppercase().contains("ENDPOINT")) {
        clients.check(endpoint).map_err(|reason| bad(format!("{name}: {reason}")))?;
    }
    let client = || clients.get().map_err(|error| bad(format!("no client: {error}")));
    let opened = |store: object_store::Result<_>| store.map_err(|error| bad(error.to_string()));
    match scheme {
        "s3" => {
            let store = |checksums| opened(s3(first, credentials, checksums, clients));
            let address = s3_endpoint(credentials).or_else(|| std::env::var("AWS_ENDPOINT_URL").ok());
            let address = address.unwrap_or_else(|| "S3 of AWS".to_owned());
            bucket(uri, address, store(false)?, Some(store(true)?), path)
        }
        "gs" => {
            let address = "https://storage.googleapis.com".to_owned();
            bucket(uri, address, opened(gcs(first, credentials, clients))?, None, path)
        }
        "https" if first.ends_with(".blob.core.windows.net") => {
            let container = path.split_once('/').map_or(path, |(container, _)| container);
            let below = path.split_once('/').map_or("", |(_, below)| below);
            let store = opened(azure(first, container, credentials, clients))?;
            bucket(uri, format!("https://{first}"), store, None, below)
        }
        "http" | "https" => Ok(Arc::new(Web { client: client()?, url: uri.to_owned() })),
        "hf" => {
            let (model, revision) = path.split_once(':').unwrap_or((path, "main"));
            let endpoint = credentials.get("HF_ENDPOINT").cloned().or_else(|| std::env::var("HF_ENDPOINT").ok());
            let endpoint = endpoint.unwrap_or_else(|| HUB.to_owned()).trim_end_matches('/').to_owned();
            let id = format!("{first}/{model}");
            let token = credentials.get("HF_TOKEN").cloned();
            Ok(Arc::new(Hub {
                client: client()?,
                uri: uri.to_owned(),
                endpoint,
                id,
                revision: revision.to_owned(),
                token,
            }))
        }
        _ => Err(bad(format!("{scheme}:// cannot be read here; known are s3, gs, https, http, hf and pvc"))),
    }
}

fn options(http: bool) -> ClientOptions {
    // A whole range may take long; that bytes keep coming is watched by the fetch.
    ClientOptions::new().with_timeout_disabled().with_connect_timeout(CONNECT_WITHIN).with_allow_http(http)
}

/// Few tries of its own: the fetch tries each range again, with growing pauses.
fn retries() -> RetryConfig {
    RetryConfig { max_retries: 2, retry_timeout: Duration::from_secs(20), ..RetryConfig::default() }
}

fn anonymous(credentials: &Credentials) -> bool {
    let set = |name: &str| credentials.get(name).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    set("AWS_ANONYMOUS_CREDENTIAL") || set("awsAnonymousCredential")
}

/// The endpoint that the credentials name: by KServe's own names, and a host without scheme, as its secrets have them.
fn s3_endpoint(credentials: &Credentials) -> Option<String> {
    let given = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "S3_ENDPOINT"].iter().find_map(|name| credentials.get(*name))?;
    let plain =
        credentials.get("S3_USE_HTTPS").is_some_and(|value| value == "0" || value.eq_ignore_ascii_case("false"));
    let scheme = if plain { "http" } else { "https" };
    Some(if given.contains("://") { given.clone() } else { format!("{scheme}://{given}") })
}

/// With `checksums`: for HEADs alone, which ask for checksums and show their answers' headers.
fn s3(
    bucket: &str,
    credentials: &Credentials,
    checksums: bool,
    clients: &Clients,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retries());
    for (name, value) in credentials {
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let given = s3_endpoint(credentials);
    if let Some(endpoint) = &given {
        builder = builder.with_endpoint(endpoint);
    }
    let has_key = credentials.contains_key("AWS_ACCESS_KEY_ID") || std::env::var_os("AWS_ACCESS_KEY_ID").is_some();
    let unsigned = anonymous(credentials) || (given.is_some() && !has_key);
    builder = builder.with_skip_signature(unsigned);
    let builder = if checksums {
        clients.headers_seen(builder, options(true))
    } else {
        builder.with_client_options(options(true)).with_http_connector(clients.connector())
    };
    Ok(Arc::new(builder.build()?))
}

fn gcs(bucket: &str, credentials: &Credentials, clients: &Clients) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retries());
    // The names that KServe's secrets have.
    let names = ["gcloud-application-credentials.json", "GOOGLE_SERVICE_ACCOUNT_KEY"];
    let key = names.iter().find_map(|name| credentials.get(*name));
    let own =
        ["GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS"].iter().any(|n| std::env::var_os(n).is_some());
    builder = match key {
        Some(key) => builder.with_service_account_key(key),
        None => builder.with_skip_signature(!own),
    };
    let builder = builder.with_client_options(options(false)).with_http_connector(clients.connector());
    Ok(Arc::new(builder.build()?))
}

fn azure(
    host: &str,
    container: &str,
    credentials: &Credentials,
    clients: &Clients,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let account = host.split('.').next().unwrap_or_default();
    let mut builder = MicrosoftAzureBuilder::from_env().with_account(account).with_container_name(container);
    for (name, value) in credentials {
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let unsigned = !credentials.keys().any(|name| name.to_ascii_uppercase().starts_with("AZ"));
    let builder = builder.with_retry(retries()).with_skip_signature(unsigned);
    let builder = builder.with_client_options(options(false)).with_http_connector(clients.connector());
    Ok(Arc::new(builder.build()?))
}

fn bucket(
    uri: &str,
    address: String,
    store: Arc<dyn ObjectStore>,
    heads: Option<Arc<dyn ObjectStore>>,
    prefix: &str,
) -> Result<Arc<dyn Source>, ModelError> {
    let prefix = Path::parse(prefix.trim_end_matches('/'))
        .map_err(|error| ModelError::Source { uri: uri.to_owned(), reason: error.to_string() })?;
    Ok(Arc::new(Bucket { address, store, heads, uri: uri.to_owned(), prefix }))
}

/// All keys below a prefix of an object store, or the one key of that name.
struct Bucket {
    /// See [`Source::address`].
    address: String,
    store: Arc<dyn ObjectStore>,
    /// The same store, asked for checksums; `None` where it gives none.
    heads: Option<Arc<dyn ObjectStore>>,
    uri: String,
    prefix: Path,
}

impl Bucket {
    fn error(&self, error: object_store::Error) -> ModelError {
        let (uri, reason) = (self.uri.clone(), chain(&error));
        match error {
            object_store::Error::NotFound { .. } => ModelError::NotFound { uri, reason },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                ModelError::Rejected { uri, reason: format!("the store refuses these credentials: {reason}") }
            }
            _ => ModelError::Source { uri, reason },
        }
    }

    /// Why a listing failed. Its error does not tell a bucket that is missing from one that is closed;
    /// that of a HEAD of the bucket does.
    async fn no_listing(&self, error: object_store::Error) -> ModelError {
        if has_no_answer(&error) {
            return self.error(error);
        }
        let (uri, reason) = (self.uri.clone(), error.to_string());
        match self.store.head(&Path::default()).await {
            Err(object_store::Error::NotFound { .. }) => {
                ModelError::NotFound { uri, reason: format!("the bucket is not there: {reason}") }
            }
            Err(object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }) => {
                ModelError::Rejected { uri, reason: format!("the store refuses these credentials: {reason}") }
            }
            _ => self.error(error),
        }
    }
}

fn object_of(meta: ObjectMeta, path: String) -> Object {
    Object { path, location: meta.location.to_string(), size: meta.size, etag: meta.e_tag, sha256: None, md5: None }
}

#[async_trait]
impl Source for Bucket {
    fn address(&self) -> &str {
        &self.address
    }

    async fn list(&self) -> Result<Vec<Object>, ModelError> {
        let found: Vec<ObjectMeta> = match self.store.list(Some(&self.prefix)).try_collect().await {
            Ok(found) => found,
            Err(error) => return Err(self.no_listing(error).await),
        };
        let below = |meta: ObjectMeta| {
            let parts: Vec<_> =
                meta.location.prefix_match(&self.prefix)?.map(|part| part.as_ref().to_owned()).collect();
            // Tools mark folders by empty objects of their name.
            (!parts.is_empty()).then(|| object_of(meta, parts.join("/")))
        };
        let mut objects: Vec<_> = found.into_iter().filter_map(below).collect();
        if objects.is_empty() && !self.prefix.as_ref().is_empty() {
            let meta = self.store.head(&self.prefix).await.map_err(|error| self.error(error))?;
            let name = self.prefix.filename().unwrap_or("model").to_owned();
            objects.push(object_of(meta, name));
        }
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(objects)
    }

    async fn checksums(&self, object: &Object) -> Result<Checksums, ModelError> {
        let Some(heads) = &self.heads else { return Ok(Checksums::default()) };
        let location = Path::parse(&object.location)
            .map_err(|error| ModelError::Source { uri: self.uri.clone(), reason: error.to_string() })?;
        let options = GetOptions { head: true, if_match: object.etag.clone(), ..Default::default() };
        let answer = heads.get_opts(&location, options).await.map_err(|error| self.error(error))?;
        Ok(answer.extensions.get::<SeenHeaders>().map(|seen| Checksums::of_s3(&seen.0)).unwrap_or_default())
    }

    async fn read(&self, object: &Object, range: Range<u64>) -> Result<Content, String> {
        let options =
            GetOptions { range: Some(GetRange::Bounded(range)), if_match: object.etag.clone(), ..Default::default() };
        let location = Path::parse(&object.location).map_err(|error| error.to_string())?;
        let found = self.store.get_opts(&location, options).await.map_err(|error| error.to_string())?;
        Ok(found.into_stream().map_err(|error| error.to_string()).boxed())
    }
}

/// One file of a web server.
struct Web {
    client: reqwest::Client,
    url: String,
}

#[async_trait]
impl Source for Web {
    fn address(&self) -> &str {
        &self.url
    }

    async fn list(&self) -> Result<Vec<Object>, ModelError> {
        let uri = self.url.clone();
        let answer = self.client.head(&self.url).send().await;
        let answer = answer.map_err(|error| ModelError::Source { uri: uri.clone(), reason: chain(&error) })?;
        let reason = format!("the server answers {}", answer.status());
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Err(ModelError::NotFound { uri, reason }),
            _ => return Err(ModelError::Source { uri, reason }),
        }
        let text = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let Some(size) = text(header::CONTENT_LENGTH).and_then(|size| size.parse().ok()) else {
            return Err(ModelError::Source { uri, reason: "the server does not say how large the file is".to_owned() });
        };
        let etag = text(header::ETAG).or_else(|| text(header::LAST_MODIFIED)).map(ToOwned::to_owned);
        let path = self.url.split(['?', '#']).next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let md5 = Checksums::of_web(answer.headers()).md5;
        Ok(vec![Object { path: name, location: self.url.clone(), size, etag, sha256: None, md5 }])
    }

    async fn read(&self, object: &Object, range: Range<u64>) -> Result<Content, String> {
        let request = self.client.get(&object.location);
        web_range(request, object, range).await
    }
}

/// GETs a range. A server that does not know ranges sends all, of which the part is taken.
async fn web_range(request: reqwest::RequestBuilder, object: &Object, range: Range<u64>) -> Result<Content, String> {
    let mut request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
    // Weak validators and dates do not match byte for byte; sizes and SHA-256 are checked anyhow.
    if let Some(etag) = object.etag.as_ref().filter(|etag| etag.starts_with('"')) {
        request = request.header(header::IF_MATCH, etag);
    }
    let answer = request.send().await.map_err(|error| chain(&error))?;
    let skip = match answer.status() {
        StatusCode::PARTIAL_CONTENT => 0,
        StatusCode::OK => range.start,
        status => return Err(format!("the server answers {status}")),
    };
    let want = range.end - range.start;
    let state = (answer.bytes_stream().boxed(), skip, want);
    let cut = futures::stream::try_unfold(state, |(mut bytes, mut skip, left)| async move {
        loop {
            if left == 0 {
                return Ok(None);
            }
            let Some(chunk) = bytes.next().await else { return Ok(None) };
            let mut chunk = chunk.map_err(|error| chain(&error))?;
            let gone = skip.min(chunk.len() as u64);
            skip -= gone;
            let _ = chunk.split_to(gone as usize);
            chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            if !chunk.is_empty() {
                let rest = left - chunk.len() as u64;
                return Ok(Some((chunk, (bytes, skip, rest))));
            }
        }
    });
    Ok(cut.boxed())
}

/// The causes of an error, the nearest first.
fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    let mut cause = error.source();
    std::iter::from_fn(move || {
        let next = cause?;
        cause = next.source();
        Some(next)
    })
}

/// An error with its causes, which reqwest leaves out, as far as its text does not have them.
fn chain(error: &(dyn Error + 'static)) -> String {
    causes(error)
        .map(ToString::to_string)
        .fold(error.to_string(), |text, cause| if text.contains(&cause) { text } else { format!("{text}: {cause}") })
}

/// Returns `true` if the store could not be reached: another request would fare no better.
fn has_no_answer(error: &object_store::Error) -> bool {
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<HttpError>())
        .any(|http| matches!(http.kind(), HttpErrorKind::Connect | HttpErrorKind::Timeout))
}

/// A repository of the Hugging Face hub at a revision.
struct Hub {
    client: reqwest::Client,
    uri: String,
    endpoint: String,
    id: String,
    revision: String,
    token: Option<String>,
}

#[derive(Deserialize)]
struct Snapshot {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hub {
    fn get(&self, url: &str) -> reqwest::RequestBuilder {
        let request = self.client.get(url);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }
}

#[async_trait]
impl Source for Hub {
    fn address(&self) -> &str {
        &self.endpoint
    }

    async fn list(&self) -> Result<Vec<Object>, ModelError> {
        let uri = self.uri.clone();
        let failed = |reason: String| ModelError::Source { uri: uri.clone(), reason };
        let url = format!("{}/api/models/{}/revision/{}?blobs=true", self.endpoint, self.id, self.revision);
        let answer = self.get(&url).send().await.map_err(|error| failed(chain(&error)))?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                let reason = format!("the hub has no such model or revision {:?}", self.revision);
                return Err(ModelError::NotFound { uri, reason });
            }
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                let reason = format!("the hub answers {status}: is HF_TOKEN missing, or not allowed to read it?");
                return Err(ModelError::Rejected { uri, reason });
            }
            status => return Err(failed(format!("the hub answers {status}"))),
        }
        let body = answer.bytes().await.map_err(|error| failed(chain(&error)))?;
        let snapshot: Snapshot = serde_json::from_slice(&body).map_err(|error| failed(error.to_string()))?;
        let mut objects = Vec::new();
        for file in snapshot.siblings {
            let lfs = file.lfs.as_ref();
            let size = lfs.and_then(|lfs| lfs.size).or(file.size);
            let size = size.ok_or_else(|| failed(format!("the hub gives no size of {:?}", file.rfilename)))?;
            // The commit, not the branch: a push in the middle of a fetch must not mix two versions.
            let location = format!("{}/{}/resolve/{}/{}", self.endpoint, self.id, snapshot.sha, file.rfilename);
            let sha256 = lfs.and_then(|lfs| lfs.sha256.clone());
            objects.push(Object { path: file.rfilename, location, size, etag: file.blob_id, sha256, md5: None });
        }
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(objects)
    }

    async fn read(&self, object: &Object, range: Range<u64>) -> Result<Content, String> {
        web_range(self.get(&object.location), object, range).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_does_not_answer_is_named_with_the_cause() {
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let credentials = Credentials::from([
            ("AWS_ENDPOINT_URL".to_owned(), format!("http://{closed}")),
            ("AWS_REGION".to_owned(), "us-east-1".to_owned()),
        ]);
        let source = open("s3://models/iris", &credentials, &Clients::default()).unwrap();
        assert_eq!(source.address(), format!("http://{closed}"));
        let error = source.list().await.unwrap_err();
        assert_eq!(error.reason(), "ModelFetchFailed");
        let message = error.to_string();
        assert!(message.contains(&closed.to_string()) && message.contains("Connection refused"), "{message}");
        assert_eq!(message.matches("Connection refused").count(), 1, "{message}");
    }
}
