//! Behaviour over time, and properties.
