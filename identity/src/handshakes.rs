//! Who may talk to whom, over real handshakes.

use std::{os::unix::fs::PermissionsExt as _, time::SystemTime};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use futures::StreamExt as _;
use rustls::{ClientConfig, ServerConfig};
use tokio::net::TcpListener;

fn live(authority: &Authority, member: &Member) -> Arc<LiveIdentity> {
    LiveIdentity::new(&authority.issue(member, &[], HOUR).unwrap()).unwrap()
}

fn node(name: &str) -> Member {
    Member::node(name).unwrap()
}

/// Serves one greeting per connection, with the caller's identity.
async fn serve(config: ServerConfig) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut connections =
            std::pin::pin!(accept_tls(listener, config, Default::default(), AcceptMetrics::default()));
        while let Some(Ok(mut stream)) = connections.next().await {
            let caller =
                member_of(&stream).map_or_else(|error| error.to_string(), |certificate| certificate.member.to_string());
            // The client may have hung up: it decides, not the server.
            let _ = stream.write_all(caller.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    address
}

async fn greet(address: SocketAddr, expected: &Member, config: ClientConfig) -> io::Result<String> {
    let mut stream = connect_tls(&address.to_string(), expected, Arc::new(config)).await?;
    let mut greeting = String::new();
    stream.read_to_string(&mut greeting).await?;
    Ok(greeting)
}

#[tokio::test]
async fn members_of_a_cell_know_each_other() {
    let authority = Authority::generate("main").unwrap();
    let address = serve(live(&authority, &node("a")).server_config(&[b"h2"]).unwrap()).await;
    let client = live(&authority, &node("b"));
    let greeting = greet(address, &node("a"), client.client_config(&[b"h2"]).unwrap()).await.unwrap();
    assert_eq!(greeting, "node b");
    let other_name = greet(address, &node("c"), client.client_config(&[b"h2"]).unwrap()).await;
    assert!(other_name.is_err(), "a is not c");
}

#[tokio::test]
async fn strangers_and_other_cells_are_refused() {
    let (ours, theirs) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    let strict = serve(live(&ours, &node("a")).server_config(&[]).unwrap()).await;
    let open = serve(live(&ours, &Member::Coordinator).server_config_optional_client(&[]).unwrap()).await;

    let foreign = live(&theirs, &node("b")).client_config(&[]).unwrap();
    assert!(greet(strict, &node("a"), foreign).await.is_err(), "the client must not trust our server");

    // A client that trusts us but shows another cell's certificate, or none.
    let mut mixed = theirs.issue(&node("b"), &[], HOUR).unwrap();
    mixed.ca_pem = ours.certificate_pem().to_owned();
    let mixed = LiveIdentity::new(&mixed).unwrap();
    assert!(greet(strict, &node("a"), mixed.client_config(&[]).unwrap()).await.is_err());
    assert!(greet(open, &Member::Coordinator, mixed.client_config(&[]).unwrap()).await.is_err());

    let nobody = || {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ours.certificate().unwrap().der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        config.with_root_certificates(roots).with_no_client_auth()
    };
    assert!(greet(strict, &node("a"), nobody()).await.is_err());
    let greeting = greet(open, &Member::Coordinator, nobody()).await.unwrap();
    assert_eq!(greeting, "certificate: none was presented");
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let authority = Authority::generate("main").unwrap();
    let address = serve(live(&authority, &node("a")).server_config(&[]).unwrap()).await;
    let long_ago = SystemTime::now() - HOUR * 3;
    let expired = LiveIdentity::new(&authority.issue_at(&node("b"), &[], HOUR, long_ago).unwrap()).unwrap();
    assert!(greet(address, &node("a"), expired.client_config(&[]).unwrap()).await.is_err());
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let authority = Authority::generate("main").unwrap();
    let long_ago = SystemTime::now() - HOUR * 3;
    let server = LiveIdentity::new(&authority.issue_at(&node("a"), &[], HOUR, long_ago).unwrap()).unwrap();
    let address = serve(server.server_config(&[]).unwrap()).await;
    let client = live(&authority, &node("b"));
    assert!(greet(address, &node("a"), client.client_config(&[]).unwrap()).await.is_err());
    let (key_pem, csr_pem) = new_csr().unwrap();
    let certificate_pem = authority.sign(&csr_pem, &node("a"), NODE_LIFETIME, SystemTime::now()).unwrap();
    let ca_pem = authority.certificate_pem().to_owned();
    server.replace(&Credentials { certificate_pem, key_pem, ca_pem }).unwrap();
    assert_eq!(greet(address, &node("a"), client.client_config(&[]).unwrap()).await.unwrap(), "node b");
}

#[test]
fn credentials_that_are_replaced_meanwhile_are_read_as_a_whole() {
    let authority = Authority::generate("main").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    authority.issue(&node("a"), &[], HOUR).unwrap().save(path).unwrap();
    let old_certificate = std::fs::read(path.join("cert.pem")).unwrap();
    authority.issue(&node("a"), &[], HOUR).unwrap().save(path).unwrap();
    let new_certificate = std::fs::read(path.join("cert.pem")).unwrap();
    // Between the key and the certificate.
    std::fs::write(path.join("cert.pem"), old_certificate).unwrap();
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| Credentials::load(path));
        std::thread::sleep(Duration::from_millis(50));
        std::fs::write(path.join("new.pem"), new_certificate).unwrap();
        std::fs::rename(path.join("new.pem"), path.join("cert.pem")).unwrap();
        loading.join().unwrap().expect("it waits for the certificate");
    });
}

/// What `authority` issues to a node that trusts all of these.
fn trusting(authority: &Authority, name: &str, trusted: &[&Authority]) -> Credentials {
    let ca_pem = trusted.iter().map(|authority| authority.certificate_pem()).collect();
    Credentials { ca_pem, ..authority.issue(&node(name), &[], HOUR).unwrap() }
}

#[tokio::test]
async fn members_pass_from_one_authority_to_the_next_without_new_listeners_or_connectors() {
    let (old, new) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    let (a, b) = (live(&old, &node("a")), live(&old, &node("b")));
    let address = serve(a.server_config(&[]).unwrap()).await;
    let connector = b.client_config(&[]).unwrap();
    let greets = async || greet(address, &node("a"), connector.clone()).await.is_ok();
    assert!(greets().await);
    a.replace(&trusting(&old, "a", &[&old, &new])).unwrap();
    b.replace(&trusting(&new, "b", &[&old, &new])).unwrap();
    assert!(greets().await, "both authorities are trusted");
    a.replace(&trusting(&new, "a", &[&new])).unwrap();
    assert!(greets().await, "the new one is trusted");
    b.replace(&trusting(&old, "b", &[&old, &new])).unwrap();
    assert!(!greets().await, "the old one is trusted no longer, and nothing that it has verified counts");
    b.replace(&trusting(&new, "b", &[&old])).unwrap();
    assert!(!greets().await, "the connector does not trust the new one any more");
}

#[tokio::test]
async fn a_token_of_the_signing_authority_admits_while_several_are_trusted() {
    let (old, new) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    for (signer, other) in [(&old, &new), (&new, &old)] {
        let issued = signer.issue(&Member::Coordinator, &[], HOUR).unwrap();
        let both = Credentials { ca_pem: old.certificate_pem().to_owned() + new.certificate_pem(), ..issued };
        let server = LiveIdentity::new(&both).unwrap();
        let address = serve(server.server_config_optional_client(&[b"h2"]).unwrap()).await;
        let pinned = |authority: &Authority| transport::pinned_config(authority.pin()).unwrap();
        assert!(greet(address, &Member::Coordinator, pinned(signer)).await.is_ok());
        assert!(greet(address, &Member::Coordinator, pinned(other)).await.is_err());
    }
}

#[tokio::test]
async fn connections_of_an_authority_that_is_trusted_no_longer_are_closed() {
    let (old, new) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    let revocations = Revocations::default();
    let watch = |authority: &Authority| {
        let issued = authority.issue(&node("a"), &[], HOUR).unwrap();
        revocations.watch(&MemberCertificate::from_pem(&issued.certificate_pem).unwrap()).unwrap()
    };
    let (mut stale, mut fresh) = (watch(&old), watch(&new));
    let is_closed =
        async |watched: &mut Revoked| futures::poll!(std::future::poll_fn(|cx| watched.poll_revoked(cx))).is_ready();
    revocations.close_untrusted(&[old.certificate().unwrap(), new.certificate().unwrap()]);
    assert!(!is_closed(&mut stale).await && !is_closed(&mut fresh).await);
    revocations.close_untrusted(&[new.certificate().unwrap()]);
    assert!(is_closed(&mut stale).await && !is_closed(&mut fresh).await);
}

#[tokio::test]
async fn joining_trusts_only_the_pinned_authority() {
    let (ours, theirs) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    let address = serve(live(&ours, &Member::Coordinator).server_config_optional_client(&[b"h2"]).unwrap()).await;
    let pinned = |authority: &Authority| transport::pinned_config(authority.pin()).unwrap();
    assert!(greet(address, &Member::Coordinator, pinned(&ours)).await.is_ok());
    let error = greet(address, &Member::Coordinator, pinned(&theirs)).await.unwrap_err().to_string();
    assert!(error.contains("join token"), "{error}");
    // A node of the right cell is not the coordinator.
    let node_server = serve(live(&ours, &node("a")).server_config_optional_client(&[b"h2"]).unwrap()).await;
    assert!(greet(node_server, &Member::Coordinator, pinned(&ours)).await.is_err());
}

#[test]
fn a_request_gets_only_the_names_that_the_signer_sets() {
    let authority = Authority::generate("main").unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let wish = rcgen::CertificateParams::new(vec!["coordinator.pilotlight.internal".to_owned()]).unwrap();
    let csr_pem = wish.serialize_request(&key).unwrap().pem().unwrap();
    let certificate_pem = authority.sign(&csr_pem, &node("b"), HOUR, SystemTime::now()).unwrap();
    let credentials =
        Credentials { certificate_pem, key_pem: key.serialize_pem(), ca_pem: authority.certificate_pem().to_owned() };
    let chain = credentials.chain().unwrap();
    assert_eq!(MemberCertificate::from_der(&chain[0]).unwrap().member, node("b"));
    assert!(!String::from_utf8_lossy(&chain[0]).contains("coordinator."));
    assert!(authority.check_csr("nonsense").is_err());
}

#[test]
fn credentials_go_through_a_directory_and_the_key_is_private() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::generate("main").unwrap();
    let credentials = authority.issue(&node("a"), &["localhost".into(), "127.0.0.1".into()], HOUR).unwrap();
    assert!(!Credentials::exist(directory.path()));
    credentials.save(directory.path()).unwrap();
    assert_eq!(Credentials::load(directory.path()).unwrap(), credentials);
    let mode = std::fs::metadata(directory.path().join("key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    std::fs::write(directory.path().join("cert.pem"), "nonsense").unwrap();
    assert!(Credentials::load(directory.path()).unwrap_err().to_string().contains("certificate"));
    let missing = Credentials::load(&directory.path().join("none")).unwrap_err().to_string();
    assert!(missing.contains("cert.pem"), "{missing}");
}

#[test]
fn two_thirds_of_a_life_are_over_at_renewal() {
    let authority = Authority::generate("main").unwrap();
    let credentials = authority.issue(&node("a"), &[], HOUR).unwrap();
    let (from, until) = credentials.validity().unwrap();
    let renew = credentials.renew_at().unwrap();
    assert_eq!(renew.duration_since(from).unwrap() * 3, until.duration_since(from).unwrap() * 2);
}

#[test]
fn an_authority_of_ones_own_is_checked() {
    let (a, b) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    let mixed = Authority::from_pem("main", a.certificate_pem(), &b.key_pem()).unwrap_err().to_string();
    assert!(mixed.contains("does not belong"), "{mixed}");
    let leaf = a.issue(&node("a"), &[], HOUR).unwrap();
    let leaf = Authority::from_pem("main", &leaf.certificate_pem, &leaf.key_pem).unwrap_err().to_string();
    assert!(leaf.contains("not a CA"), "{leaf}");
}

// ── Clients that do nothing ──────────────────────────────────────────────────────────────────────────────

/// The first bytes of a TLS record that never ends.
const HALF_A_RECORD: [u8; 5] = [22, 3, 1, 2, 0];

#[tokio::test]
async fn half_open_handshakes_do_not_delay_others() {
    let authority = Authority::generate("main").unwrap();
    let address = serve(live(&authority, &node("a")).server_config(&[]).unwrap()).await;
    let mut half_open = Vec::new();
    for _ in 0..300 {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(&HALF_A_RECORD).await.unwrap();
        half_open.push(stream);
    }
    let client = live(&authority, &node("b"));
    assert_eq!(greet(address, &node("a"), client.client_config(&[]).unwrap()).await.unwrap(), "node b");
    let oldest = half_open[0].try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(oldest.kind(), io::ErrorKind::WouldBlock, "nobody had to wait until it was closed");
}

/// Serves nothing but handshakes of node `a`, and what is counted of them.
async fn counted(authority: &Authority) -> (SocketAddr, impl Fn() -> String + use<>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (config, metrics) = (live(authority, &node("a")).server_config(&[]).unwrap(), AcceptMetrics::default());
    let mut registry = prometheus_client::registry::Registry::default();
    metrics.register(&mut registry);
    tokio::spawn(accept_tls(listener, config, Default::default(), metrics).for_each(|_| async {}));
    let text = move || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    };
    (address, text)
}

#[tokio::test(start_paused = true)]
async fn refused_connections_are_counted_by_reason() {
    let (ours, theirs) = (Authority::generate("main").unwrap(), Authority::generate("main").unwrap());
    let (address, counted) = counted(&ours).await;
    let mut foreign = theirs.issue(&node("b"), &[], HOUR).unwrap();
    foreign.ca_pem = ours.certificate_pem().to_owned();
    let foreign = LiveIdentity::new(&foreign).unwrap().client_config(&[]).unwrap();
    assert!(greet(address, &node("a"), foreign).await.is_err());
    let mut silent = tokio::net::TcpStream::connect(address).await.unwrap();
    let _ = silent.read_to_end(&mut Vec::new()).await;
    let text = counted();
    for reason in ["handshake_failed", "handshake_timeout"] {
        assert!(text.contains(&format!("tls_connections_refused_total{{reason=\"{reason}\"}} 1")), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_does_not_end_is_closed() {
    let authority = Authority::generate("main").unwrap();
    let address = serve(live(&authority, &node("a")).server_config(&[]).unwrap()).await;
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(&HALF_A_RECORD).await.unwrap();
    let begun = tokio::time::Instant::now();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut Vec::new()).await;
    assert!(begun.elapsed() <= Duration::from_secs(11), "{:?}", begun.elapsed());
}

/// A coordinator's listener that only reads, until the client or the connection ends.
async fn listen_only(authority: &Authority) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = live(authority, &Member::Coordinator).server_config_optional_client(&[]).unwrap();
    tokio::spawn(async move {
        let mut connections =
            std::pin::pin!(accept_tls(listener, config, Default::default(), AcceptMetrics::default()));
        while let Some(Ok(mut stream)) = connections.next().await {
            tokio::spawn(async move { stream.read_to_end(&mut Vec::new()).await });
        }
    });
    address
}

/// How long a client that sends `first` and then nothing stays connected, at most an hour.
async fn connected_for(address: SocketAddr, config: ClientConfig, first: &[u8]) -> Duration {
    let mut stream = connect_tls(&address.to_string(), &Member::Coordinator, Arc::new(config)).await.unwrap();
    stream.write_all(first).await.unwrap();
    stream.flush().await.unwrap();
    let begun = tokio::time::Instant::now();
    let mut bytes = Vec::new();
    let _ = tokio::time::timeout(HOUR, stream.read_to_end(&mut bytes)).await;
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_certificate_is_closed_and_a_member_may_stay() {
    let authority = Authority::generate("main").unwrap();
    let address = listen_only(&authority).await;
    let nobody = || transport::pinned_config(authority.pin()).unwrap();
    let member = live(&authority, &node("b"));
    let member = || member.client_config(&[]).unwrap();
    let second = Duration::from_secs(1);
    assert!(connected_for(address, nobody(), b"").await <= 11 * second);
    assert!(connected_for(address, nobody(), b"x").await <= 61 * second);
    assert!(connected_for(address, member(), b"").await <= 11 * second);
    assert!(connected_for(address, member(), b"x").await >= HOUR);
}

#[tokio::test(start_paused = true)]
async fn the_oldest_connection_without_a_certificate_makes_room() {
    let authority = Authority::generate("main").unwrap();
    let address = listen_only(&authority).await;
    let config = Arc::new(transport::pinned_config(authority.pin()).unwrap());
    let mut open = Vec::new();
    for _ in 0..=128 {
        open.push(connect_tls(&address.to_string(), &Member::Coordinator, Arc::clone(&config)).await.unwrap());
    }
    let begun = tokio::time::Instant::now();
    // It may end without a farewell.
    let _ = open[0].read_to_end(&mut Vec::new()).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "not by its own timeout");
}
