//! How many replicas a revision should have: Knative's KPA as pure functions.
