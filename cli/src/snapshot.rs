//! `pilotlight snapshot`.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, anyhow};
use pilotlight_coordinator::{
    config::StoreConfig,
    store::{Store, embedded::EmbeddedStore, etcd::EtcdStore, snapshot::Snapshot},
};

use crate::{coordinator::EtcdArgs, failure::Failure, output};

/// What to do with snapshots.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Write everything that is stored for a cell to a file.
    ///
    /// Reads etcd, or the store in the data directory of a coordinator that does not run. The file holds secrets as
    /// they are stored: sealed with the secrets key, which is not in the file. Keep a copy of that key, too.
    Save {
        /// File to write; it must not exist.
        file: PathBuf,
        #[command(flatten)]
        place: Place,
    },
    /// Put a snapshot into a store. No coordinator of the cell may run.
    Restore {
        /// File that `save` has written.
        file: PathBuf,
        /// Replace what the store holds.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Verify a snapshot, and show what is in it.
    Inspect {
        /// File that `save` has written.
        file: PathBuf,
    },
}

/// Where the store is.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// Name of the cell.
    #[arg(long, env = "PILOTLIGHT_CELL", default_value = "main")]
    cell: String,
    /// Data directory of a coordinator with the embedded store.
    #[arg(long, env = "PILOTLIGHT_DATA_DIR", default_value = "/var/lib/pilotlight/coordinator", value_name = "DIR")]
    data_dir: PathBuf,
    #[command(flatten)]
    etcd: EtcdArgs,
}

impl Place {
    fn etcd_or_file(self) -> anyhow::Result<Result<Arc<dyn Store>, PathBuf>> {
        Ok(match self.etcd.store() {
            StoreConfig::Embedded => Err(self.data_dir.join("state.redb")),
            StoreConfig::Etcd(etcd) => Ok(Arc::new(EtcdStore::new(&etcd, &format!("/pilotlight/{}/", self.cell))?)),
        })
    }
}

/// Carries out a command.
pub async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Save { file, place } => save(&file, place).await?,
        Command::Restore { file, force, place } => restore(&file, force, place).await?,
        Command::Inspect { file } => print(&file, &read(&file)?, "")?,
    }
    Ok(())
}

async fn save(file: &Path, place: Place) -> anyhow::Result<()> {
    let cell = place.cell.clone();
    let store = match place.etcd_or_file()? {
        Ok(store) => store,
        Err(path) if path.exists() => Arc::new(EmbeddedStore::open(&path)?),
        Err(path) => return Err(anyhow!("data-dir: {}: there is no store", path.display())),
    };
    let snapshot = Snapshot::take(&store, &cell, jiff::Timestamp::now()).await?;
    write_new(file, &snapshot.encode()?).with_context(|| file.display().to_string())?;
    print(file, &snapshot, " saved")
}

async fn restore(file: &Path, force: bool, place: Place) -> anyhow::Result<()> {
    let snapshot = read(file)?;
    if snapshot.header.cell != place.cell {
        return Err(anyhow!("cell: {:?}, but the snapshot is of cell {:?}", place.cell, snapshot.header.cell));
    }
    match place.etcd_or_file()? {
        Ok(store) => snapshot.restore(&store, force).await?,
        Err(path) => {
            if let Some(directory) = path.parent() {
                std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
            }
            snapshot.restore_file(&path, force).await?;
        }
    }
    print(file, &snapshot, " restored; start the coordinator with the secrets key of that time")
}

fn read(file: &Path) -> anyhow::Result<Snapshot> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Snapshot::parse(&text).with_context(|| file.display().to_string())
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_new(file: &Path, text: &str) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    let written = options.write(true).create_new(true).mode(0o600).open(file)?;
    let write = |mut file: std::fs::File| file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    write(written).inspect_err(|_| {
        // What is there of it is of no use.
        let _ = std::fs::remove_file(file);
    })
}

fn print(file: &Path, snapshot: &Snapshot, done: &str) -> anyhow::Result<()> {
    let header = &snapshot.header;
    let mut text = format!(
        "{}: cell {}, revision {}, {}, {} keys{done}\n",
        file.display(),
        header.cell,
        header.revision,
        header.taken_at,
        header.keys
    );
    for (kind, count) in snapshot.counts() {
        text += &format!("  {kind}: {count}\n");
    }
    output::print(&text).map_err(|_| anyhow!("standard output is closed"))
}
