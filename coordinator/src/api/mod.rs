//! The operators' gRPC API and the HTTP status listener.
