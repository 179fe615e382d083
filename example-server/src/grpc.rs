//! The Open Inference Protocol (V2) over gRPC.

use std::sync::Arc;

use ndarray::Array2;
use tonic::{Code, Request, Response, Status};

use self::inference::{
    InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse,
    ModelReadyRequest, ModelReadyResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse,
    ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
    model_infer_request::InferInputTensor,
    model_infer_response::InferOutputTensor,
    model_metadata_response::TensorMetadata,
};
use crate::{
    Prediction, Server,
    error::Refusal,
    tensor::{self, Content, Datatype, Form, INPUT, OUTPUTS},
};

/// Generated from `inference/grpc_predict_v2.proto`.
#[allow(missing_docs, clippy::all, reason = "generated code; the documentation is in the .proto file")]
pub(crate) mod inference {
    tonic::include_proto!("inference");
}

/// The paths of [`service`], as a route.
pub(crate) const PATHS: &str = "/inference.GRPCInferenceService/{method}";

/// The service, for gRPC's paths beside those of REST.
pub(crate) fn service(server: Arc<Server>) -> GrpcInferenceServiceServer<Inference> {
    GrpcInferenceServiceServer::new(Inference { server })
}

/// The protocol's calls, answered by one server.
#[derive(Debug)]
pub(crate) struct Inference {
    server: Arc<Server>,
}

impl Inference {
    fn check(&self, name: &str, version: &str) -> Result<(), Refusal> {
        self.server.check_name(name)?;
        if version.is_empty() {
            return Ok(());
        }
        Err(Refusal::not_found(format!("model {name:?} has no versions, and none of {version:?}")))
    }

    async fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse, Refusal> {
        self.check(&request.model_name, &request.model_version)?;
        let classifier = self.server.classifier()?;
        let flowers = flowers(&request)?;
        let wanted = tensor::wanted(request.outputs.iter().map(|output| output.name.as_str()))?;
        tokio::time::sleep(self.server.request_time).await;
        let prediction = classifier.predict(&flowers);
        let mut answer =
            ModelInferResponse { model_name: request.model_name, id: request.id, ..ModelInferResponse::default() };
        // As it was asked, so it is answered.
        if request.raw_input_contents.is_empty() {
            answer.outputs = wanted.iter().map(|form| output(form, &prediction, true)).collect();
        } else {
            answer.outputs = wanted.iter().map(|form| output(form, &prediction, false)).collect();
            answer.raw_output_contents = wanted.iter().map(|form| raw(form, &prediction)).collect();
        }
        Ok(answer)
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.server.ready() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        self.check(&name, &version)?;
        Ok(Response::new(ModelReadyResponse { ready: self.server.ready() }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "pilotlight-example-server".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: Vec::new(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        self.check(&name, &version)?;
        Ok(Response::new(ModelMetadataResponse {
            name,
            versions: Vec::new(),
            platform: "linfa".to_owned(),
            inputs: vec![metadata(&INPUT)],
            outputs: OUTPUTS.iter().map(metadata).collect(),
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let in_flight = self.server.begin();
        let answer = self.infer(request.into_inner()).await;
        in_flight.answered();
        Ok(Response::new(answer?))
    }

    async fn repository_model_load(
        &self,
        _: Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        Err(no_repository())
    }

    async fn repository_model_unload(
        &self,
        _: Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        Err(no_repository())
    }
}

fn no_repository() -> Status {
    Status::unimplemented("this server has one model, loaded when it starts, and no repository")
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal.status.as_u16() {
            400 => Code::InvalidArgument,
            404 => Code::NotFound,
            503 => Code::Unavailable,
            _ => Code::Unknown,
        };
        let Refusal { field, message, .. } = refusal;
        Self::new(code, if field.is_empty() { message } else { format!("{field}: {message}") })
    }
}

fn metadata(form: &Form) -> TensorMetadata {
    TensorMetadata { name: form.name.to_owned(), datatype: form.datatype.to_owned(), shape: form.shape.to_vec() }
}

/// Reads the one input, whichever way it is given.
fn flowers(request: &ModelInferRequest) -> Result<Array2<f64>, Refusal> {
    let [input] = request.inputs.as_slice() else {
        return Err(Refusal::field("inputs", format!("expected one tensor, got {}", request.inputs.len())));
    };
    let rows = tensor::rows(&input.shape)?;
    let datatype = Datatype::parse(&input.datatype, &input.name)?;
    let values = match request.raw_input_contents.as_slice() {
        [] => typed_values(input, datatype)?,
        [raw] if input.contents.is_none() => tensor::raw_values(raw, datatype, "raw_input_contents[0]")?,
        [_] => {
            let message = "expected contents or raw_input_contents, got both";
            return Err(Refusal::field("inputs[0].contents", message));
        }
        more => {
            let message = format!("expected one for the one input, got {}", more.len());
            return Err(Refusal::field("raw_input_contents", message));
        }
    };
    tensor::flowers(rows, values)
}

fn typed_values(input: &InferInputTensor, datatype: Datatype) -> Result<Vec<f64>, Refusal> {
    let contents = input.contents.as_ref();
    let contents =
        contents.ok_or_else(|| Refusal::field("inputs[0].contents", "missing, and no raw_input_contents"))?;
    Ok(match datatype {
        Datatype::Fp32 => contents.fp32_contents.iter().copied().map(f64::from).collect(),
        Datatype::Fp64 => contents.fp64_contents.clone(),
        Datatype::Int64 => contents.int64_contents.iter().map(|value| *value as f64).collect(),
    })
}

fn output(form: &Form, prediction: &Prediction, with_contents: bool) -> InferOutputTensor {
    let contents = with_contents.then(|| match form.content {
        Content::Probabilities => {
            InferTensorContents { fp64_contents: prediction.probabilities.clone(), ..InferTensorContents::default() }
        }
        _ => InferTensorContents { int64_contents: classes(prediction).collect(), ..InferTensorContents::default() },
    });
    InferOutputTensor {
        name: form.name.to_owned(),
        datatype: form.datatype.to_owned(),
        shape: form.shape_for(prediction.classes.len()),
        contents,
        ..InferOutputTensor::default()
    }
}

fn raw(form: &Form, prediction: &Prediction) -> Vec<u8> {
    match form.content {
        Content::Probabilities => prediction.probabilities.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => classes(prediction).flat_map(i64::to_le_bytes).collect(),
    }
}

fn classes(prediction: &Prediction) -> impl Iterator<Item = i64> {
    prediction.classes.iter().map(|class| *class as i64)
}
