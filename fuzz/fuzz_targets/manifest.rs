//! Any text is answered: the parser of manifests neither panics nor hangs, and refuses if and only if it
//! names an error.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use pilotlight_coordinator::{
    manifest::{self, Reading},
    spec::Runtimes,
};

static RUNTIMES: LazyLock<Runtimes> = LazyLock::new(Runtimes::built_in);

fuzz_target!(|text: &str| {
    let scaling = manifest::scaling_defaults();
    for strict in [false, true] {
        let reading = Reading { namespace: "default", strict, scaling: &scaling, runtimes: &RUNTIMES };
        for document in manifest::read(text, reading) {
            let refused = document.findings.iter().any(|finding| finding.is_error());
            assert_eq!(document.object.is_none(), refused);
        }
    }
});
