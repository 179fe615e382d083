//! Which node and which GPUs a replica gets.
