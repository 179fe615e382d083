//! A real model server for the examples: iris, trained on the spot.
//!
//! It needs no download: the classifier is fitted to R. A. Fisher's 150 flowers when the server starts.
//! It speaks KServe's V1 protocol and the Open Inference Protocol (V2) over REST and gRPC, all on one port,
//! and can be told to load or answer slowly, so that cold starts, queues and streams can be tried on any
//! machine. It can read a model's files into memory at its start, and sleeps and wakes by vLLM's endpoints,
//! so that the rungs of warmth can be tried, too. To try OpenAI's chat streams it has an echo, and says so. A transformer and an explainer for the
//! same flowers make a chain with it.

mod around;
mod classifier;
mod error;
mod grpc;
#[cfg(test)]
mod grpc_tests;
mod openai;
mod serve;
mod sleep;
mod state;
mod stream;
mod tensor;
#[cfg(test)]
mod tests;
mod v1;
mod v2;
mod weights;

pub use around::{Around, AroundOptions, run_around};
pub use classifier::{Classifier, FEATURES, Prediction};
pub use serve::{Options, ServerError, router, run, serve};
pub use state::{Server, Stats};
