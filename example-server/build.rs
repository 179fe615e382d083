//! Compiles the protocol's `.proto` file with the pure-Rust `protox`, so that no `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=inference");
    let descriptors = protox::compile(["inference/grpc_predict_v2.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
