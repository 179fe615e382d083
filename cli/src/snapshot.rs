//! `pilotlight snapshot`.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, anyhow};
use pilotlight_coordinator::{
    config::{EtcdConfig, StoreConfig},
    store::{Store, embedded::EmbeddedStore, etcd::EtcdStore, snapshot::Snapshot},
};
use pilotlight_proto::control::v1::SaveSnapshotRequest;

use crate::{connect::ConnectionArgs, coordinator::EtcdArgs, failure::Failure, output};

/// What to do with snapshots.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Write everything that is stored for a cell to a file.
    ///
    /// Asks the coordinator, which needs the role admin; or reads etcd, or the data directory of a coordinator that does
    /// not run. The file holds secrets as they are stored: sealed with the secrets key, which is not in the file. Keep a
    /// copy of that key, too.
    Save {
        /// File to write; it must not exist.
        file: PathBuf,
        #[command(flatten)]
        source: Source,
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

/// Where to read the store, if not through the coordinator.
#[derive(Debug, clap::Args)]
pub struct Source {
    /// Name of the cell in etcd, and of the one in the data directory.
    #[arg(long, env = "PILOTLIGHT_CELL", default_value = "main")]
    cell: String,
    /// Data directory of a coordinator with the embedded store, which must not run.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdArgs,
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
            StoreConfig::Etcd(etcd) => Ok(Arc::new(etcd_store(&etcd, &self.cell)?)),
        })
    }
}

/// Carries out a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    match command {
        Command::Save { file, source } => save(connection, &file, source).await,
        Command::Restore { file, force, place } => Ok(restore(&file, force, place).await?),
        Command::Inspect { file } => Ok(print(&file, &read(&file)?, "")?),
    }
}

async fn save(connection: ConnectionArgs, file: &Path, source: Source) -> Result<(), Failure> {
    if file.exists() {
        return Err(anyhow!("{}: exists already", file.display()).into());
    }
    let Source { cell, data_dir, etcd } = source;
    let snapshot = match (etcd.store(), data_dir) {
        (StoreConfig::Embedded, None) => from_coordinator(connection).await?,
        (StoreConfig::Embedded, Some(data_dir)) => from_directory(&cell, &data_dir).await?,
        (StoreConfig::Etcd(etcd), _) => take(Arc::new(etcd_store(&etcd, &cell)?), &cell).await?,
    };
    let text = snapshot.encode().map_err(anyhow::Error::from)?;
    write_new(file, &text).with_context(|| file.display().to_string())?;
    Ok(print(file, &snapshot, " saved")?)
}

async fn from_coordinator(connection: ConnectionArgs) -> Result<Snapshot, Failure> {
    let mut stream = connection.client()?.save_snapshot(SaveSnapshotRequest {}).await?.into_inner();
    let mut file = Vec::new();
    while let Some(chunk) = stream.message().await? {
        file.extend(chunk.data);
    }
    let text = String::from_utf8(file).map_err(anyhow::Error::from)?;
    Ok(Snapshot::parse(&text).map_err(anyhow::Error::from)?)
}

async fn from_directory(cell: &str, data_dir: &Path) -> anyhow::Result<Snapshot> {
    let path = data_dir.join("state.redb");
    if !path.exists() {
        return Err(anyhow!("data-dir: {}: there is no store", path.display()));
    }
    let in_use = "; without --data-dir, the coordinator that uses it is asked";
    let store = EmbeddedStore::open(&path).map_err(|error| {
        let advice = if error.to_string().contains("in use") { in_use } else { "" };
        anyhow!("{error}{advice}")
    })?;
    take(Arc::new(store), cell).await
}

async fn take(store: Arc<dyn Store>, cell: &str) -> anyhow::Result<Snapshot> {
    Ok(Snapshot::take(&store, cell, jiff::Timestamp::now()).await?)
}

fn etcd_store(etcd: &EtcdConfig, cell: &str) -> anyhow::Result<EtcdStore> {
    Ok(EtcdStore::new(etcd, &format!("/pilotlight/{cell}/"))?)
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
    match snapshot.format_version() {
        Ok(version) => text += &format!("  store format version: {}\n", version.unwrap_or(1)),
        Err(error) => text += &format!("  {error}\n"),
    }
    for (kind, count) in snapshot.counts() {
        text += &format!("  {kind}: {count}\n");
    }
    output::print(&text).map_err(|_| anyhow!("standard output is closed"))
}
