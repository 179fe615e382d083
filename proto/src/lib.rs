//! Pilotlight's wire protocol, generated from the `.proto` files beside this crate.
//!
//! Units, ranges and errors are stated at each field there.
#![allow(missing_docs, clippy::all, reason = "generated code; the documentation is in the .proto files")]

/// The operators' API (`control.proto`).
pub mod control {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("pilotlight.control.v1");
    }
}

/// Agent to coordinator (`fleet.proto`).
pub mod fleet {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("pilotlight.fleet.v1");
    }
}

/// Agent to agent (`peer.proto`).
pub mod peer {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("pilotlight.peer.v1");
    }
}

/// The encoded `FileDescriptorSet` of all files above, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
