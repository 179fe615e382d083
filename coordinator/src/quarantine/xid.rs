//! XIDs that end a GPU's use, after NVIDIA's XID catalog
//! (<https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html>).
//!
//! Not listed are errors that the catalog blames on the application, and after which the next process works: 13, 31, 43,
//! 45, 68 and 109, which NVIDIA's device plugin for Kubernetes ignores, too. Other XIDs that are not listed are reported
//! and counted, and quarantine nothing.

/// What one XID means for its GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FatalXid {
    /// As in the catalog.
    pub xid: u64,
    /// What has happened, and what cures it.
    pub meaning: &'static str,
    /// `true` if processes that use the GPU cannot go on. Otherwise they serve until others are ready elsewhere.
    pub stops_work: bool,
}

const fn stops(xid: u64, meaning: &'static str) -> FatalXid {
    FatalXid { xid, meaning, stops_work: true }
}

const fn degrades(xid: u64, meaning: &'static str) -> FatalXid {
    FatalXid { xid, meaning, stops_work: false }
}

/// All XIDs that quarantine a GPU, ascending.
pub const FATAL_XIDS: [FatalXid; 17] = [
    stops(46, "the GPU has stopped processing; reset it"),
    stops(48, "double-bit ECC error; reset the GPU"),
    degrades(54, "auxiliary power is not connected; check the cabling"),
    stops(62, "a micro-controller of the GPU has halted; reset the GPU"),
    degrades(63, "a row of memory is to be remapped; reset the GPU"),
    stops(64, "a row of memory could not be remapped; reset the GPU, and replace it if this repeats"),
    degrades(74, "NVLink error; reset all GPUs of the link, and check the link if this repeats"),
    stops(79, "the GPU has fallen off the bus; restart the node"),
    stops(94, "contained uncorrectable memory error; reset the GPU"),
    stops(95, "uncontained uncorrectable memory error; reset the GPU"),
    stops(110, "security fault; reset the GPU"),
    stops(119, "the GPU's system processor (GSP) does not answer; reset the GPU"),
    stops(120, "error of the GPU's system processor (GSP); reset the GPU"),
    degrades(136, "an NVLink could not be trained; reset all GPUs of the link"),
    stops(140, "unrecovered ECC error; reset the GPU"),
    stops(143, "the GPU could not be initialised; reset it"),
    stops(158, "fatal timeout of the GPU; reset it"),
];

/// What the XID means, if it quarantines a GPU.
pub fn fatal(xid: u64) -> Option<FatalXid> {
    FATAL_XIDS.into_iter().find(|fatal| fatal.xid == xid)
}
