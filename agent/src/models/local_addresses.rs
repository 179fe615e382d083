//! Addresses of this machine, which manifests may not have the agent fetch from unless the operator allows it.
//!
//! Services on loopback and cloud metadata endpoints on link-local addresses trust whoever reaches them. A `storageUri`
//! comes from whoever may apply a manifest, so that it must not reach them through the agent.

use std::{
    error::Error,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::{Action, Attempt, Policy},
};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 10;

/// Returns `true` if the address is loopback, link-local or unspecified.
fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => {
            let mapped = v6.to_ipv4_mapped().is_some_and(|v4| is_local(v4.into()));
            mapped || v6 == Ipv6Addr::LOCALHOST || v6.is_unspecified() || v6.is_unicast_link_local()
        }
    }
}

/// Checks a URL, or a host without scheme, whose host is an address. Names are checked when they are resolved.
///
/// # Errors
/// The address is local; the message names it.
pub(super) fn check(url: &str) -> Result<(), String> {
    let parsed = if url.contains("://") { Url::parse(url) } else { Url::parse(&format!("http://{url}")) };
    parsed.map_or(Ok(()), |url| check_url(&url))
}

fn check_url(url: &Url) -> Result<(), String> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    match host.parse() {
        Ok(address) if is_local(address) => Err(refusal(host)),
        _ => Ok(()),
    }
}

fn refusal(host: &str) -> String {
    format!(
        "{host} is a loopback, link-local or unspecified address, from which models are not fetched unless the agent \
         is started with --allow-local-storage"
    )
}

/// Follows redirects, but none to a local address.
pub(super) fn redirects() -> Policy {
    Policy::custom(|attempt: Attempt<'_>| -> Action {
        if let Err(refusal) = check_url(attempt.url()) {
            return attempt.error(refusal);
        }
        if attempt.previous().len() >= MAX_REDIRECTS {
            return attempt.error("too many redirects");
        }
        attempt.follow()
    })
}

/// Resolves names as the system does, and refuses those of local addresses.
#[derive(Debug, Default)]
pub(super) struct RemoteResolver;

impl Resolve for RemoteResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            // All are refused for one: a name whose next answer differs must not get through.
            if found.iter().any(|address| is_local(address.ip())) {
                return Err(Box::<dyn Error + Send + Sync>::from(refusal(name.as_str())));
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{clients::Clients, source};

    #[test]
    fn loopback_link_local_and_unspecified_addresses_are_refused_however_they_are_written() {
        for local in [
            "http://127.0.0.1/m",
            "http://127.9.9.9:80/m",
            "http://2130706433/m",
            "http://0x7f.1/m",
            "http://0.0.0.0/m",
            "http://169.254.169.254/latest/meta-data",
            "http://[::1]/m",
            "http://[::]/m",
            "http://[fe80::1]/m",
            "http://[::ffff:127.0.0.1]/m",
            "127.0.0.1:9000",
        ] {
            assert!(check(local).unwrap_err().contains("--allow-local-storage"), "{local}");
        }
        for remote in ["http://10.0.0.1/m", "https://example.com/m", "http://[2001:db8::1]/m", "minio:9000"] {
            assert_eq!(check(remote), Ok(()), "{remote}");
        }
    }

    #[tokio::test]
    async fn storage_on_this_machine_is_refused_wherever_its_address_comes_from() {
        let clients = Clients::refusing_local();
        let refused = |uri: &str, credentials: &[(&str, &str)]| {
            let credentials = credentials.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            source::open(uri, &credentials.collect(), &clients).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused("http://169.254.169.254/m", &[]).contains("--allow-local-storage"));
        let by_secret = refused("s3://bucket/m", &[("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")]);
        assert!(by_secret.contains("AWS_ENDPOINT_URL") && by_secret.contains("--allow-local-storage"), "{by_secret}");
        let by_name = source::open("http://localhost:1/m", &source::Credentials::new(), &clients).unwrap();
        let error = by_name.list().await.unwrap_err().to_string();
        assert!(error.contains("--allow-local-storage"), "{error}");
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_a_local_address_is_refused() {
        let refused = RemoteResolver.resolve("localhost".parse().unwrap()).await.err().unwrap();
        assert!(refused.to_string().contains("--allow-local-storage"), "{refused}");
    }
}
