//! The one loop: observe, decide, write, push.
