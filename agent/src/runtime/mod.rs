//! Starting, probing, adopting and stopping replicas.
