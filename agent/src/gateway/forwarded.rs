//! Which host a request is for, and what replicas learn about the client: `X-Forwarded-*`.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, HeaderValue, Version, header, request::Parts};
use ipnet::IpNet;

use super::answer::Answer;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The host that a request is for. An absolute URI (RFC 9112, 3.2.2) or `:authority` (RFC 9113, 8.3.1) wins
/// over Host, which is replaced by it.
///
/// # Errors
/// There is more than one Host, none where HTTP/1.1 needs one, or one that is no text.
pub(super) fn effective_host(parts: &mut Parts) -> Result<String, Answer> {
    let bad = |reason: &str| Answer::BadRequest { reason: reason.to_owned() };
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let (host, more) = (hosts.next().cloned(), hosts.next().is_some());
    if more {
        return Err(bad("the request has more than one Host header"));
    }
    if let Some(authority) = parts.uri.authority() {
        let text = authority.as_str();
        let host = text.rsplit_once('@').map_or(text, |(_, host)| host).to_owned();
        let value = HeaderValue::from_str(&host).map_err(|_| bad("the request's authority is malformed"))?;
        parts.headers.insert(header::HOST, value);
        return Ok(host);
    }
    match host {
        Some(host) => Ok(host.to_str().map_err(|_| bad("the Host header is malformed"))?.to_owned()),
        None if parts.version == Version::HTTP_11 => Err(bad("the request has no Host header")),
        None => Ok(String::new()),
    }
}

/// Returns `true` if `client` may say on whose behalf it sends requests.
pub(super) fn is_trusted(client: IpAddr, proxies: &[IpNet]) -> bool {
    let client = client.to_canonical();
    proxies.iter().any(|network| network.contains(&client))
}

/// Sets `X-Forwarded-For`, `-Host` and `-Proto`. What a trusted proxy set is kept, and its own address appended;
/// what other clients set is replaced. Headers that only gateways may set are removed.
pub(super) fn set_forwarded(parts: &mut Parts, client: SocketAddr, host: &str, trusted: bool) {
    let own: Vec<_> = parts.headers.keys().filter(|name| name.as_str().starts_with("pilotlight-")).cloned().collect();
    for name in own {
        parts.headers.remove(name);
    }
    if !trusted {
        for name in [FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO, header::FORWARDED] {
            parts.headers.remove(name);
        }
    }
    let client = client.ip().to_canonical().to_string();
    let via: Vec<_> = parts.headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).collect();
    let via = via.into_iter().chain([client.as_str()]).collect::<Vec<_>>().join(", ");
    if let Ok(via) = HeaderValue::from_str(&via) {
        parts.headers.insert(FORWARDED_FOR, via);
    }
    if let Ok(host) = HeaderValue::from_str(host) {
        parts.headers.entry(FORWARDED_HOST).or_insert(host);
    }
    parts.headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
}
