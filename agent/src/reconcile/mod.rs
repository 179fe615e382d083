//! Desired assignment against what runs: the next steps.
