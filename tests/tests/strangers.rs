//! Who has no certificate, or another cell's, is refused; a join token works once.

use pilotlight_identity::{Authority, Credentials, JoinToken, LiveIdentity, Member, Trust, channel, new_csr};
use pilotlight_proto::{
    control::v1::{ListNodesRequest, control_client::ControlClient},
    fleet::v1::{
        AgentMessage, Hello, JoinRequest, agent_message::Message, enrollment_client::EnrollmentClient,
        fleet_client::FleetClient,
    },
};
use pilotlight_tests::cell::Cell;
use tonic::Code;

fn hello(node: &str) -> AgentMessage {
    AgentMessage { message: Some(Message::Hello(Hello { node_name: node.to_owned(), ..Default::default() })) }
}

async fn join(url: &str, token: &str, node: &str) -> Result<Credentials, tonic::Status> {
    let pin = token.parse::<JoinToken>().unwrap().pin();
    let (key_pem, csr_pem) = new_csr().unwrap();
    let request = JoinRequest { token: token.to_owned(), node_name: node.to_owned(), csr_pem };
    let answer = EnrollmentClient::new(channel(url, &Trust::Pinned(pin)).unwrap()).join(request).await?.into_inner();
    Ok(Credentials { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem })
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_of_the_cell_are_let_in() {
    let cell = Cell::start(vec![]).await;
    let url = format!("https://127.0.0.1:{}", cell.port());
    let token = cell.token();
    let pin = token.parse::<JoinToken>().unwrap().pin();

    // Without a certificate.
    let nobody = channel(&url, &Trust::Pinned(pin)).unwrap();
    let refused = FleetClient::new(nobody.clone()).session(tokio_stream::once(hello("gpu-1"))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = ControlClient::new(nobody).list_nodes(ListNodesRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    // With a certificate of another cell that says the same.
    let ours = join(&url, &token, "gpu-1").await.unwrap();
    let mut foreign = Authority::generate("main")
        .unwrap()
        .issue(&Member::node("gpu-1").unwrap(), &[], std::time::Duration::from_secs(600))
        .unwrap();
    foreign.ca_pem.clone_from(&ours.ca_pem);
    let foreign = Trust::Cell(LiveIdentity::new(&foreign).unwrap());
    let refused = FleetClient::new(channel(&url, &foreign).unwrap()).session(tokio_stream::once(hello("gpu-1"))).await;
    assert!(refused.is_err(), "TLS itself refuses it");

    // With a certificate of ours, but for another name, or another job.
    let ours = Trust::Cell(LiveIdentity::new(&ours).unwrap());
    let ours = channel(&url, &ours).unwrap();
    let refused = FleetClient::new(ours.clone()).session(tokio_stream::once(hello("gpu-2"))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = ControlClient::new(ours.clone()).list_nodes(ListNodesRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let welcomed = FleetClient::new(ours).session(tokio_stream::once(hello("gpu-1"))).await;
    assert!(welcomed.is_ok());

    // In plaintext.
    let plain = channel(&url.replace("https", "http"), &Trust::Plaintext).unwrap();
    assert!(ControlClient::new(plain).list_nodes(ListNodesRequest {}).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_works_once() {
    let cell = Cell::start(vec![]).await;
    let url = format!("https://127.0.0.1:{}", cell.port());
    let token = cell.token();
    let bad_name = join(&url, &token, "Not A Name").await.unwrap_err();
    assert_eq!(bad_name.code(), Code::InvalidArgument);
    // A mistake has not used it up. Two at once: one gets in.
    let (one, other) = tokio::join!(join(&url, &token, "gpu-1"), join(&url, &token, "gpu-2"));
    assert_eq!(u8::from(one.is_ok()) + u8::from(other.is_ok()), 1);
    let refused = join(&url, &token, "gpu-3").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("token create"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_delay_no_control_call() {
    let cell = Cell::start(vec![]).await;
    let mut half_open = Vec::new();
    for count in 0..300 {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", cell.port())).await.unwrap();
        if count % 2 == 0 {
            // The beginning of a TLS record.
            stream.writable().await.unwrap();
            stream.try_write(&[22, 3, 1, 2, 0]).unwrap();
        }
        half_open.push(stream);
    }
    cell.operator.must(&["get", "nodes"]);
    let oldest = half_open[0].try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(oldest.kind(), std::io::ErrorKind::WouldBlock, "the call waited until the others were closed");
}
