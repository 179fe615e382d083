//! Pilotlight.
fn main() {}
