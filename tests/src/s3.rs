//! An S3 server on a directory: `s3s-fs`, which checks signatures.

mod files;

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use hyper::{HeaderMap, Method, Request, Uri, body::Incoming, header, http::Extensions, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use s3s::{
    Body, S3 as _, S3Request,
    auth::SimpleAuth,
    dto::{PutObjectInput, StreamingBlob},
    service::S3ServiceBuilder,
};

use files::Files;

/// The one access key that the server knows.
pub const KEY: &str = "AKIDPILOTLIGHT";
/// Its secret.
pub const SECRET: &str = "not-a-real-secret";

/// How agents reach such a server at this endpoint, in their own environment.
pub fn env(endpoint: &str) -> Vec<(&'static str, String)> {
    [
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ALLOW_HTTP", "true"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .to_vec()
}

/// A running server. Ends with the test's runtime.
pub struct S3 {
    root: tempfile::TempDir,
    address: SocketAddr,
    ranges: Arc<AtomicU64>,
}

impl S3 {
    /// Listens on any port of the loopback.
    ///
    /// # Panics
    /// It cannot.
    pub async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let inner = s3s_fs::FileSystem::new(root.path()).unwrap();
        let mut builder = S3ServiceBuilder::new(Files { root: root.path().to_owned(), inner });
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = builder.build();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ranges = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&ranges);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (service, counted) = (service.clone(), Arc::clone(&counted));
                let answer = service_fn(move |request: Request<Incoming>| {
                    if request.headers().contains_key(header::RANGE) {
                        counted.fetch_add(1, Ordering::SeqCst);
                    }
                    let service = service.clone();
                    async move {
                        let answer = hyper::service::Service::call(&service, request).await;
                        Ok::<_, Infallible>(answer.unwrap_or_else(|error| panic!("the S3 server failed: {error:?}")))
                    }
                });
                tokio::spawn(async move {
                    // A client that goes away is no trouble of the server.
                    let _ =
                        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        });
        Self { root, address, ranges }
    }

    /// `http://host:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How agents reach it, in their own environment.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        env(&self.endpoint())
    }

    /// Where an object's content is on disk.
    pub fn file(&self, bucket: &str, key: &str) -> PathBuf {
        self.root.path().join(bucket).join(key)
    }

    /// Makes a bucket.
    ///
    /// # Panics
    /// The disk refuses.
    pub fn bucket(&self, name: &str) {
        std::fs::create_dir_all(self.root.path().join(name)).unwrap();
    }

    /// Makes an object and its bucket, past the server: it then has no checksum but what the server computes.
    ///
    /// # Panics
    /// The disk refuses.
    pub fn put(&self, bucket: &str, key: &str, content: &[u8]) {
        let path = self.file(bucket, key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Uploads an object and makes its bucket: the server keeps its MD5, whatever becomes of the content.
    ///
    /// # Panics
    /// The server refuses.
    pub async fn upload(&self, bucket: &str, key: &str, content: &[u8]) {
        self.bucket(bucket);
        let input = PutObjectInput::builder().bucket(bucket.to_owned()).key(key.to_owned());
        let body = StreamingBlob::from(Body::from(content.to_vec()));
        let input = input.body(Some(body)).build().unwrap();
        let request = S3Request {
            input,
            method: Method::PUT,
            uri: Uri::default(),
            headers: HeaderMap::new(),
            extensions: Extensions::new(),
            credentials: None,
            region: None,
            service: None,
            trailing_headers: None,
        };
        s3s_fs::FileSystem::new(self.root.path()).unwrap().put_object(request).await.unwrap();
    }

    /// Requests for parts of objects so far.
    pub fn ranges(&self) -> u64 {
        self.ranges.load(Ordering::SeqCst)
    }
}
