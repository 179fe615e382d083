//! A real model server for the examples: iris, trained on the spot.
