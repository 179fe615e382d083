//! Desired state, durable: the `Store` trait, embedded and etcd.
