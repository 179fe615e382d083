//! S3's checksums: stores give them to HEADs that ask, in headers that `object_store` does not pass on.

use async_trait::async_trait;
use http::{HeaderMap, HeaderValue};
use object_store::{
    ClientOptions,
    aws::AmazonS3Builder,
    client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector},
};

/// All headers of the answer, in the extensions of a result.
#[derive(Debug, Clone)]
pub(super) struct SeenHeaders(pub(super) HeaderMap);

/// Has each request ask for checksums, and each result carry [`SeenHeaders`]. Not for listings: the header
/// that asks is signed with requests for objects alone.
pub(super) fn headers_seen(builder: AmazonS3Builder, options: ClientOptions) -> AmazonS3Builder {
    let asking = HeaderMap::from_iter([(
        http::HeaderName::from_static("x-amz-checksum-mode"),
        HeaderValue::from_static("ENABLED"),
    )]);
    builder.with_client_options(options.with_default_headers(asking)).with_http_connector(Connector)
}

#[derive(Debug)]
struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Client(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct Client(HttpClient);

#[async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut answer = self.0.execute(request).await?;
        let seen = SeenHeaders(answer.headers().clone());
        answer.extensions_mut().insert(seen);
        Ok(answer)
    }
}
