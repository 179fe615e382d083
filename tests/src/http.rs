//! A client for gateways.

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, body::Bytes, body::Incoming};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

/// One gateway's address and a connection pool.
#[derive(Debug, Clone)]
pub struct Gateway {
    port: u16,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: StatusCode,
    /// Headers.
    pub headers: hyper::HeaderMap,
    /// Body as text.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// It is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }
}

impl Gateway {
    /// The gateway on this loopback port.
    pub fn at(port: u16) -> Self {
        Self { port, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// Sends a request for `host`.
    ///
    /// # Errors
    /// The connection failed or the answer broke off.
    pub async fn send(&self, host: &str, request: hyper::http::request::Builder, body: &str) -> anyhow::Result<Answer> {
        let response = self.open(host, request, body).await?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Answer { status: parts.status, headers: parts.headers, body: String::from_utf8_lossy(&body).into_owned() })
    }

    /// Sends a request for `host`, and leaves the body to be read.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn open(
        &self,
        host: &str,
        request: hyper::http::request::Builder,
        body: &str,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request: Request<Full<Bytes>> = request.body(Full::from(body.to_owned()))?;
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
        *request.uri_mut() = format!("http://127.0.0.1:{}{path}", self.port).parse()?;
        request.headers_mut().insert("host", host.parse()?);
        Ok(self.client.request(request).await?)
    }

    /// `GET path`.
    ///
    /// # Errors
    /// The connection failed or the answer broke off.
    pub async fn get(&self, host: &str, path: &str) -> anyhow::Result<Answer> {
        self.send(host, Request::get(path), "").await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// The connection failed or the answer broke off.
    pub async fn post(&self, host: &str, path: &str, body: &str) -> anyhow::Result<Answer> {
        self.send(host, Request::post(path).header("content-type", "application/json"), body).await
    }
}
