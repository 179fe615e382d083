//! HTTP to stores: one client for all of them, so that a fetch or a look finds connections open, and does not
//! read the system's root certificates first.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use http::{HeaderMap, HeaderName, HeaderValue};
use object_store::{
    ClientConfigKey, ClientOptions,
    aws::AmazonS3Builder,
    client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector},
};

use super::{
    local_addresses::{self, RemoteResolver},
    source::CONNECT_WITHIN,
};

/// Makes the client when it is first needed. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Clients {
    client: Arc<Mutex<Option<reqwest::Client>>>,
    /// Whether addresses of this machine are refused.
    refuses_local: bool,
}

impl Clients {
    /// Refuses loopback, link-local and unspecified addresses, also after redirects.
    pub(super) fn refusing_local() -> Self {
        Self { refuses_local: true, ..Self::default() }
    }

    /// Checks that an address may be fetched from, as far as it names no host that must be resolved.
    ///
    /// # Errors
    /// It is this machine's, and that is refused.
    pub(super) fn check(&self, url: &str) -> Result<(), String> {
        if self.refuses_local { local_addresses::check(url) } else { Ok(()) }
    }

    /// The client: it waits for a connection for [`CONNECT_WITHIN`], and for answers as long as they take.
    ///
    /// # Errors
    /// There can be none, such as without any root certificate.
    pub(super) fn get(&self) -> reqwest::Result<reqwest::Client> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        install_crypto_provider();
        let builder = reqwest::Client::builder().connect_timeout(CONNECT_WITHIN).http1_only();
        let builder = if self.refuses_local {
            builder.dns_resolver(Arc::new(RemoteResolver)).redirect(local_addresses::redirects())
        } else {
            builder
        };
        Ok(client.insert(builder.user_agent(concat!("pilotlight/", env!("CARGO_PKG_VERSION"))).build()?).clone())
    }

    /// How an object store gets it.
    pub(super) fn connector(&self) -> Connector {
        Connector { clients: self.clone(), headers: false }
    }

    /// Has each request of a builder ask for S3's checksums, and each result carry [`SeenHeaders`]: stores give
    /// checksums to those that ask, in headers that `object_store` does not pass on. Not for listings: the
    /// header that asks is signed with requests for objects alone.
    pub(super) fn headers_seen(&self, builder: AmazonS3Builder, options: ClientOptions) -> AmazonS3Builder {
        let asks = (HeaderName::from_static("x-amz-checksum-mode"), HeaderValue::from_static("ENABLED"));
        builder
            .with_client_options(options.with_default_headers(HeaderMap::from_iter([asks])))
            .with_http_connector(Connector { clients: self.clone(), headers: true })
    }
}

/// Must come before any client is built: `reqwest` panics without a provider.
fn install_crypto_provider() {
    // Another part of the program may have set the process's provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// All headers of the answer, in the extensions of a result.
#[derive(Debug, Clone)]
pub(super) struct SeenHeaders(pub(super) HeaderMap);

/// Gives the one client to object stores.
#[derive(Debug)]
pub(super) struct Connector {
    clients: Clients,
    /// True: results carry [`SeenHeaders`].
    headers: bool,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let patience = |options: &ClientOptions| options.get_config_value(&ClientConfigKey::ConnectTimeout);
        // Clouds' metadata endpoints are asked with less patience than stores.
        let as_stores = patience(options) == patience(&ClientOptions::new().with_connect_timeout(CONNECT_WITHIN));
        let client = if as_stores {
            let failed = |error| object_store::Error::Generic { store: "HTTP", source: Box::new(error) };
            HttpClient::new(self.clients.get().map_err(failed)?)
        } else {
            install_crypto_provider();
            ReqwestConnector::default().connect(options)?
        };
        Ok(if self.headers { HttpClient::new(Seeing(client)) } else { client })
    }
}

#[derive(Debug)]
struct Seeing(HttpClient);

#[async_trait]
impl HttpService for Seeing {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut answer = self.0.execute(request).await?;
        let seen = SeenHeaders(answer.headers().clone());
        answer.extensions_mut().insert(seen);
        Ok(answer)
    }
}
