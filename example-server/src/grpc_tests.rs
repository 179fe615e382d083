//! The gRPC service, asked by a client over a connection that HTTP/1.1 uses, too.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, transport::Channel};

use crate::{
    Classifier, Server,
    grpc::inference::{
        InferTensorContents, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest, RepositoryModelLoadRequest,
        RepositoryModelUnloadRequest, ServerLiveRequest, ServerMetadataRequest, ServerReadyRequest,
        grpc_inference_service_client::GrpcInferenceServiceClient,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    router,
};

type Client = GrpcInferenceServiceClient<Channel>;

/// A virginica and a setosa.
const FLOWERS: [f64; 8] = [6.3, 3.3, 6.0, 2.5, 5.1, 3.5, 1.4, 0.2];

async fn serve(server: Arc<Server>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router(server)).await });
    address
}

async fn client(server: &Arc<Server>) -> Client {
    Client::connect(format!("http://{}", serve(Arc::clone(server)).await)).await.unwrap()
}

fn loading() -> Arc<Server> {
    Arc::new(Server::new("iris", Duration::ZERO))
}

fn loaded() -> Arc<Server> {
    let server = loading();
    server.loaded(Classifier::train().unwrap());
    server
}

fn typed() -> ModelInferRequest {
    let input = InferInputTensor {
        name: "x".to_owned(),
        datatype: "FP64".to_owned(),
        shape: vec![2, 4],
        contents: Some(InferTensorContents { fp64_contents: FLOWERS.to_vec(), ..Default::default() }),
        ..Default::default()
    };
    ModelInferRequest {
        model_name: "iris".to_owned(),
        id: "seven".to_owned(),
        inputs: vec![input],
        ..Default::default()
    }
}

fn raw(datatype: &str, bytes: Vec<u8>) -> ModelInferRequest {
    let mut request = typed();
    request.inputs[0].contents = None;
    request.inputs[0].datatype = datatype.to_owned();
    request.raw_input_contents = vec![bytes];
    request
}

fn wanting(names: &[&str], mut request: ModelInferRequest) -> ModelInferRequest {
    request.outputs = names
        .iter()
        .map(|name| InferRequestedOutputTensor { name: (*name).to_owned(), ..Default::default() })
        .collect();
    request
}

#[tokio::test]
async fn classifies_typed_contents() {
    let server = loaded();
    let answer = client(&server).await.model_infer(typed()).await.unwrap().into_inner();
    assert_eq!((answer.model_name.as_str(), answer.id.as_str()), ("iris", "seven"));
    let [output] = answer.outputs.as_slice() else { panic!("{answer:?}") };
    assert_eq!((output.name.as_str(), output.datatype.as_str()), ("output-0", "INT64"));
    assert_eq!((&output.shape, &output.contents.as_ref().unwrap().int64_contents), (&vec![2], &vec![2, 0]));
    assert!(answer.raw_output_contents.is_empty(), "as it was asked, so it is answered");
    assert_eq!((server.stats().received, server.stats().answered, server.stats().in_flight), (1, 1, 0));
}

#[tokio::test]
async fn classifies_raw_contents_of_each_datatype() {
    let mut client = client(&loaded()).await;
    let requests = [
        raw("FP64", FLOWERS.iter().flat_map(|value| value.to_le_bytes()).collect()),
        raw("FP32", FLOWERS.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect()),
        raw("INT64", FLOWERS.iter().flat_map(|value| (*value as i64).to_le_bytes()).collect()),
    ];
    for request in requests {
        let answer = client.model_infer(request).await.unwrap().into_inner();
        assert_eq!(answer.raw_output_contents, [[2i64.to_le_bytes(), 0i64.to_le_bytes()].concat()]);
        assert_eq!((answer.outputs.len(), &answer.outputs[0].contents), (1, &None));
    }
}

#[tokio::test]
async fn gives_the_outputs_that_are_asked_for_in_that_order() {
    let mut client = client(&loaded()).await;
    let answer = client.model_infer(wanting(&["predict_proba", "predict"], typed())).await.unwrap().into_inner();
    let [probabilities, classes] = answer.outputs.as_slice() else { panic!("{answer:?}") };
    assert_eq!((&probabilities.shape, &classes.shape), (&vec![2, 3], &vec![2, 1]));
    let probabilities = &probabilities.contents.as_ref().unwrap().fp64_contents;
    assert!(probabilities.len() == 6 && probabilities[2] > 0.5 && probabilities[3] > 0.5, "{probabilities:?}");
    assert_eq!(classes.contents.as_ref().unwrap().int64_contents, [2, 0]);
}

#[tokio::test]
async fn says_which_field_is_wrong() {
    let mut client = client(&loaded()).await;
    let change = |change: fn(&mut ModelInferRequest)| {
        let mut request = typed();
        change(&mut request);
        request
    };
    let cases = [
        (change(|request| request.inputs.clear()), "inputs: "),
        (change(|request| request.inputs[0].shape = vec![8]), "inputs[0].shape: "),
        (change(|request| request.inputs[0].shape = vec![-2, 4]), "inputs[0].shape: "),
        (change(|request| request.inputs[0].shape = vec![i64::MAX, 4]), "inputs[0].data: "),
        (change(|request| request.inputs[0].datatype = "BYTES".to_owned()), "inputs[0].datatype: "),
        (change(|request| request.inputs[0].datatype = "FP32".to_owned()), "inputs[0].data: "),
        (change(|request| request.inputs[0].contents = None), "inputs[0].contents: "),
        (change(|request| request.raw_input_contents = vec![vec![0; 64]]), "inputs[0].contents: "),
        (raw("FP64", vec![0; 63]), "raw_input_contents[0]: "),
        (raw("FP64", vec![0; 56]), "inputs[0].data: "),
        (raw("FP64", f64::NAN.to_le_bytes().repeat(8)), "inputs[0].data: "),
        (wanting(&["predict", "colour"], typed()), "outputs[1].name: "),
    ];
    for (request, field) in cases {
        let status = client.model_infer(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().starts_with(field), "expected {field:?} in {status:?}");
    }
}

#[tokio::test]
async fn tells_ready_loading_and_unknown_apart() {
    let named = |name: &str| ModelReadyRequest { name: name.to_owned(), version: String::new() };
    for (server, ready) in [(loading(), false), (loaded(), true)] {
        let mut client = client(&server).await;
        assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
        assert_eq!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready, ready);
        assert_eq!(client.model_ready(named("iris")).await.unwrap().into_inner().ready, ready);
        assert_eq!(client.model_ready(named("rose")).await.unwrap_err().code(), Code::NotFound);
        let version = ModelReadyRequest { version: "2".to_owned(), ..named("iris") };
        assert_eq!(client.model_ready(version).await.unwrap_err().code(), Code::NotFound);
        let code = client.model_infer(typed()).await.err().map(|status| status.code());
        assert_eq!(code, (!ready).then_some(Code::Unavailable));
    }
}

#[tokio::test]
async fn describes_itself_and_its_model_and_has_no_repository() {
    let mut client = client(&loaded()).await;
    let server = client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
    assert_eq!(server.name, "pilotlight-example-server");
    let request = ModelMetadataRequest { name: "iris".to_owned(), version: String::new() };
    let model = client.model_metadata(request).await.unwrap().into_inner();
    assert_eq!((model.inputs[0].datatype.as_str(), &model.inputs[0].shape), ("FP64", &vec![-1, 4]));
    let outputs: Vec<_> = model.outputs.iter().map(|output| output.name.as_str()).collect();
    assert_eq!(outputs, ["output-0", "predict", "predict_proba"]);
    let load = client.repository_model_load(RepositoryModelLoadRequest::default()).await.unwrap_err();
    let unload = client.repository_model_unload(RepositoryModelUnloadRequest::default()).await.unwrap_err();
    assert_eq!((load.code(), unload.code()), (Code::Unimplemented, Code::Unimplemented));
}

#[tokio::test]
async fn http1_and_grpc_share_the_port() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = serve(loaded()).await;
    let mut client = Client::connect(format!("http://{address}")).await.unwrap();
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(b"GET /v2/models/iris HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains(r#""predict_proba""#), "{answer}");
}
