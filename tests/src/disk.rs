//! Disks that are soon full.

use std::{path::Path, process::Command};

use tempfile::TempDir;

/// A small file system in memory. Unmounted with the value.
#[derive(Debug)]
pub struct SmallDisk(TempDir);

impl SmallDisk {
    /// Mounts one of this size, such as `16m`.
    ///
    /// # Errors
    /// It cannot be mounted, mostly because that needs root; what `mount` said.
    ///
    /// # Panics
    /// There is no temporary directory.
    pub fn mount(size: &str) -> Result<Self, String> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let size = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(directory.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Ok(Self(directory)),
            failed => Err(format!("no tmpfs can be mounted: {failed:?}")),
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a replica may still have its log open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
