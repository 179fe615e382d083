//! From a manifest to a validated model.
