//! Models between nodes, over connections of their own: requests do not wait behind weights.

use std::ops::Range;

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _};
use http::{Request, Response, StatusCode, Version, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::Incoming;

use super::{
    DataPath,
    answer::{Body, BoxError},
    forward::chain,
};
use crate::models::{Models, peers::Ask, source::Content};

#[async_trait]
impl Ask for DataPath {
    async fn get(&self, node: &str, path: &str, range: Option<Range<u64>>) -> Result<(StatusCode, Content), String> {
        let sender = self.weights.sender(node).await.map_err(|error| error.to_string())?;
        let address = format!("https://{node}.node.pilotlight.internal{path}");
        let mut request = Request::get(address).version(Version::HTTP_2);
        if let Some(range) = range {
            request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let request = request.body(body).map_err(|error| error.to_string())?;
        let response = sender.requests().send_request(request).await.map_err(|error| chain(&error))?;
        let (head, body) = response.into_parts();
        Ok((head.status, body.into_data_stream().map_err(|error| chain(&error)).boxed()))
    }
}

/// Answers another node's request for a model.
pub(super) async fn serve(models: &Models, request: &Request<Incoming>) -> Response<Body> {
    let range = request.headers().get(header::RANGE).and_then(|range| range.to_str().ok());
    let (status, content) = models.lend(request.uri().path(), range).await;
    let frames = content.map_ok(Frame::data).map_err(BoxError::from);
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    *response.status_mut() = status;
    response
}
