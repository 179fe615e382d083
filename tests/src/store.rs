//! Models in an S3 store behind a relay, and services whose containers serve their files.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::{
    cell::{Dev, Operator},
    container::{IMAGE, docker, image, labelled},
    eventually,
    http::Gateway,
    manifest::to_zero,
    relay::Relay,
    s3::{self, S3},
};

/// The store.
pub struct Store {
    /// Its server.
    pub s3: S3,
    /// Between agents and the server.
    pub relay: Relay,
}

/// The files of a model, as text.
pub type Files = BTreeMap<String, String>;

impl Store {
    /// `None` where there is no Docker Engine: then the caller leaves its test out.
    ///
    /// # Panics
    /// The store cannot be started.
    pub async fn start() -> Option<Self> {
        image()?;
        let s3 = S3::start().await;
        let relay = Relay::before(s3.port()).await;
        Some(Self { s3, relay })
    }

    /// Makes a model at [`uri`] of so many files of so many bytes, other ones for each name.
    pub fn put(&self, model: &str, files: usize, bytes: usize) -> Files {
        let seed: usize = model.bytes().map(usize::from).sum();
        let content = |file: usize| {
            let line = format!("{model} {seed} {file}\n");
            line.bytes().cycle().take(bytes).map(char::from).collect::<String>()
        };
        let all: Files = (0..files).map(|file| (format!("{file:03}.bin"), content(file))).collect();
        for (file, content) in &all {
            self.s3.put("models", &format!("{model}/{file}"), content.as_bytes());
        }
        all
    }

    /// Requests for parts of models so far, once those have come, too, that an agent sent before it was killed.
    pub async fn settled_ranges(&self) -> u64 {
        let (seen, same) = (AtomicU64::new(0), AtomicU64::new(0));
        eventually("no more requests come", || async {
            let now = self.s3.ranges();
            let times = if seen.swap(now, Ordering::Relaxed) == now { same.load(Ordering::Relaxed) + 1 } else { 0 };
            same.store(times, Ordering::Relaxed);
            (times >= 10).then_some(now)
        })
        .await
    }

    /// How agents reach it, in their own environment.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        s3::env(&format!("http://127.0.0.1:{}", self.relay.port()))
    }

    /// `pilotlight dev` with containers, which reads from the store.
    pub async fn dev(&self, flags: &[&str]) -> Dev {
        Dev::start(&[&["--runtime=docker"], flags].concat(), self.env()).await
    }

    /// The same in a directory of the caller's.
    pub async fn dev_in(&self, directory: TempDir, flags: &[&str]) -> Dev {
        Dev::start_in(directory, &[&["--runtime=docker"], flags].concat(), self.env()).await
    }
}

/// Where a model is in the store.
pub fn uri(model: &str) -> String {
    format!("s3://models/{model}")
}

/// A service on one GPU whose container serves the files of a model.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name, another one for each run: containers are the whole machine's.
    pub name: String,
    /// Where its model is.
    pub uri: String,
    /// `minReplicas`; with 0 it starts at zero.
    pub min_replicas: u32,
    /// Arguments of the server.
    pub args: Vec<&'static str>,
}

impl Service {
    /// One that starts at zero.
    pub fn of(model: &str) -> Self {
        let name = format!("{model}-{}", std::process::id());
        Self { name, uri: uri(model), min_replicas: 0, args: vec!["files"] }
    }

    /// One that always has a replica.
    pub fn up(model: &str) -> Self {
        Self { min_replicas: 1, ..Self::of(model) }
    }

    fn yaml(&self) -> String {
        let Self { name, uri, min_replicas, args } = self;
        let predictor = format!(
            r#"    minReplicas: {min_replicas}
    maxReplicas: 1
    containers:
      - name: kserve-container
        image: {IMAGE}
        args: {args:?}
        env: [{{name: STORAGE_URI, value: "{uri}"}}]
        resources: {{limits: {{nvidia.com/gpu: 1}}}}
"#
        );
        to_zero(name, &[], &predictor)
    }

    /// Applies it.
    ///
    /// # Panics
    /// It is refused.
    pub fn apply(&self, operator: &Operator) {
        let applied = operator.apply(&self.yaml(), &["--strict"]);
        assert_eq!(applied.code, 0, "{}", applied.err);
    }

    /// Its containers, ended ones too.
    pub fn containers(&self) -> Vec<String> {
        labelled(&format!("pilotlight.dev/service={}", self.name))
    }

    /// Asks it for all files of its model.
    ///
    /// # Panics
    /// One is not what it should be.
    pub async fn serves(&self, gateway: &Gateway, files: &Files) {
        for (file, content) in files {
            let answer = self.get(gateway, file).await;
            assert!(answer == *content, "{}: {file} is another: {:.200}", self.name, answer);
        }
    }

    /// Asks it for one file.
    ///
    /// # Panics
    /// It cannot be asked, or has no such file.
    pub async fn get(&self, gateway: &Gateway, file: &str) -> String {
        let answer = gateway.get(&format!("{}.default.localhost", self.name), &format!("/{file}")).await;
        let answer = answer.expect("an answer");
        assert_eq!(answer.status, 200, "{}: {}", self.name, answer.body);
        answer.body
    }

    /// Waits until its one replica sleeps, and gives its container, which is paused.
    ///
    /// # Panics
    /// It has none, or another state.
    pub async fn asleep(&self, operator: &Operator) -> String {
        operator.replicas_are(&self.name, 1, "Asleep").await;
        let [container] = self.containers().try_into().unwrap_or_else(|all| panic!("{} has {all:?}", self.name));
        assert_eq!(docker(&["inspect", "--format", "{{.State.Status}}", &container]).1.trim(), "paused");
        container
    }

    /// Waits until its replica has failed with this in its message and its service gives the reason. The replica.
    pub async fn fails(&self, operator: &Operator, reason: &str, said: &str) -> Value {
        eventually(&format!("{} fails: {reason}, {said}", self.name), || async {
            let replica = operator.replicas(&self.name).into_iter().next()?;
            let service = operator.json(&["get", "isvc", &self.name]);
            let conditions = service["status"]["conditions"].as_array()?;
            let ready = conditions.iter().find(|condition| condition["type"] == "PredictorReady")?;
            let failed = replica["phase"] == "Failed" && ready["status"] == "False" && ready["reason"] == reason;
            let says = |message: &Value| message.as_str().is_some_and(|message| message.contains(said));
            (failed && says(&replica["message"]) && says(&ready["message"])).then_some(replica)
        })
        .await
    }

    /// Deletes it, and waits until nothing is left of it.
    ///
    /// # Panics
    /// Something is left: a container, or a GPU that is held.
    pub async fn delete(&self, operator: &Operator) {
        operator.must(&["delete", "isvc", &self.name]);
        operator.replicas_are(&self.name, 0, "").await;
        assert!(self.containers().is_empty(), "nothing is left of {}", self.name);
        let nodes = operator.json(&["get", "nodes"]);
        let held = nodes["items"][0]["gpus"].as_array().into_iter().flatten().map(|gpu| gpu["replicas"].to_string());
        let held: String = held.collect();
        assert!(!held.contains(&self.name), "{} holds no GPU: {nodes}", self.name);
    }
}

/// The models on the disk of `pilotlight dev`.
#[derive(Debug, Clone)]
pub struct Disk(PathBuf);

impl Disk {
    /// Of this one.
    pub fn of(dev: &Dev) -> Self {
        Self(dev.data().join("agent/models"))
    }

    /// Names below one of its folders: `blobs`, `trees` or `partial`.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.join(folder)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Panics unless there are whole models alone, this many, and nothing beside them.
    ///
    /// # Panics
    /// See above.
    pub fn has_whole(&self, models: usize) {
        assert_eq!((self.names("trees").len(), self.names("partial").len()), (models, 0), "{:?}", below(&self.0));
        let linked = below(&self.0.join("trees"));
        let linked = linked.iter().filter(|path| !path.ends_with("tree.json") && !path.ends_with("pinned"));
        let inode = |path: &PathBuf| std::fs::metadata(path).map(|file| file.ino()).ok();
        let linked: BTreeSet<u64> = linked.filter_map(inode).collect();
        let is_unused = |blob: &PathBuf| inode(blob).is_some_and(|inode| !linked.contains(&inode));
        let unused: Vec<_> = below(&self.0.join("blobs")).into_iter().filter(is_unused).collect();
        assert!(unused.is_empty(), "{unused:?}");
    }

    /// Ranges that cut-off fetches have noted as being here.
    pub fn noted(&self) -> usize {
        noted(&self.0)
    }

    /// Bytes that models and what is on its way to them have on the disk. A file of several names counts once.
    fn bytes(&self) -> u64 {
        let files = ["blobs", "partial"].into_iter().flat_map(|folder| below(&self.0.join(folder)));
        let files = files.filter_map(|file| std::fs::metadata(file).ok());
        files.map(|file| (file.ino(), file.blocks() * 512)).collect::<BTreeMap<_, _>>().values().sum()
    }

    /// Looks on, and keeps the most bytes that it has seen.
    pub fn watch(&self) -> Watch {
        let most = Arc::new(AtomicU64::new(0));
        let (disk, seen) = (self.clone(), Arc::clone(&most));
        let task = tokio::spawn(async move {
            loop {
                seen.fetch_max(disk.bytes(), Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        Watch { most, task }
    }
}

/// See [`Disk::watch`]. Ends with the value.
#[derive(Debug)]
pub struct Watch {
    most: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Watch {
    /// The most bytes so far.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::SeqCst)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ranges that cut-off fetches have noted as being here, by the folder of an agent's models: in memory, or on the disk.
pub fn noted(models: &Path) -> usize {
    let journals =
        below(&models.join("partial")).into_iter().filter(|path| path.extension().is_some_and(|it| it == "done"));
    let starts = |journal: PathBuf| {
        let text = std::fs::read_to_string(journal).unwrap_or_default();
        text.lines().filter_map(|line| line.split(' ').next().map(ToOwned::to_owned)).collect::<BTreeSet<_>>()
    };
    journals.map(|journal| starts(journal).len()).sum()
}

/// Waits until all models of an agent are on the disk, and each content has one name, by the folder of its models.
pub async fn settled(models: &Path) {
    eventually("the models are settled", || async {
        let marked = below(&models.join("trees")).iter().any(|path| path.ends_with("unsettled"));
        (!marked).then_some(())
    })
    .await;
}

/// All files below a directory, of which some may go meanwhile.
fn below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { below(&path) } else { vec![path] }).collect()
}
