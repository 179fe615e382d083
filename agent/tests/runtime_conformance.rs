//! What every runtime does, asked of processes and of containers alike; then what containers alone do.
//!
//! Without a Docker Engine the container part is left out, with a message, unless
//! `PILOTLIGHT_REQUIRE_DOCKER` is set.

use std::{path::Path, process::Command, sync::Arc, time::Duration};

use pilotlight_agent::runtime::{
    DockerRuntime, DockerSettings, EndedLogs, Mount, ProcessRuntime, Running, Runtime, RuntimeError, SleepMark,
    logs::last_lines, probe::Prober,
};
use pilotlight_agent::warmth::{fall_asleep, wake};
use pilotlight_proto::fleet::v1::{
    ContainerSpec, EmptyDir, EnvVar, Files, Limits, Probe, ReplicaAssignment, SecurityContext, SleepPaths, Volume,
    VolumeMount, probe::Handler, volume::Source,
};
use pilotlight_tests::{
    container::{IMAGE, image, labelled, server},
    eventually,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Nothing here takes that long; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(120);
const NO_GRACE: Duration = Duration::from_millis(300);

/// Containers of a replica.
fn of(replica: &str) -> Vec<String> {
    labelled(&format!("pilotlight.dev/replica={replica}"))
}

/// A runtime, and how to make it anew.
struct Bench {
    docker: bool,
    data: tempfile::TempDir,
    runtime: Arc<dyn Runtime>,
}

impl Bench {
    async fn all() -> Vec<Self> {
        let mut all = vec![Self::of(false).await];
        if image().is_some() {
            all.push(Self::of(true).await);
        }
        all
    }

    async fn docker() -> Option<Self> {
        image()?;
        Some(Self::of(true).await)
    }

    async fn of(docker: bool) -> Self {
        let data = tempfile::tempdir().unwrap();
        let runtime = Self::make(docker, data.path()).await;
        Self { docker, data, runtime }
    }

    async fn make(docker: bool, data: &Path) -> Arc<dyn Runtime> {
        if docker {
            Arc::new(DockerRuntime::connect("node", data, DockerSettings::default()).await.unwrap())
        } else {
            Arc::new(ProcessRuntime::new(data, "/none".into()))
        }
    }

    /// As a later agent process would.
    async fn anew(&mut self) -> Vec<Running> {
        self.runtime = Self::make(self.docker, self.data.path()).await;
        self.runtime.adopt().await.unwrap()
    }

    fn assignment(&self, replica: &str, args: &[&str]) -> ReplicaAssignment {
        let container = ContainerSpec {
            image: if self.docker { IMAGE.into() } else { String::new() },
            command: vec![if self.docker { "/server".into() } else { server().to_string_lossy().into_owned() }],
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        };
        // Two tests never have a replica of the same name.
        let replica = format!("{replica}-{}", uuid::Uuid::new_v4().simple());
        ReplicaAssignment {
            replica,
            revision: "default/iris-00001".into(),
            namespace: "default".into(),
            service: "iris".into(),
            container: Some(container),
            ..Default::default()
        }
    }

    async fn start(&self, assignment: &ReplicaAssignment) -> Result<Running, RuntimeError> {
        self.runtime.prepare(assignment, &|_| {}).await?;
        self.runtime.start(assignment, &[]).await
    }

    /// Starts it and waits until it answers.
    async fn serve(&self, assignment: &ReplicaAssignment) -> (Running, String) {
        let running = self.start(assignment).await.unwrap();
        let answer = answer(&running).await;
        (running, answer)
    }

    async fn end(&self, running: &Running) {
        self.runtime.stop(running, NO_GRACE).await;
        self.runtime.remove(&running.replica).await;
    }

    async fn log(&self, replica: &str, expected: &str) -> String {
        let path = self.runtime.log_file(replica);
        eventually(expected, || async {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            text.contains(expected).then_some(text)
        })
        .await
    }
}

async fn ask(running: &Running) -> std::io::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(running.address).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn answer(running: &Running) -> String {
    eventually("an answer", || async { ask(running).await.ok().filter(|answer| answer.contains("args=")) }).await
}

fn has(answer: &str, line: &str) {
    assert!(answer.lines().any(|found| found.trim_end() == line), "{line:?} is not in\n{answer}");
}

#[tokio::test]
async fn a_replica_gets_what_its_assignment_says_and_serves() {
    for bench in Bench::all().await {
        let mut assignment = bench.assignment("serve", &["on", "$(PORT)", "$(GREETING)", "$$(X)"]);
        let container = assignment.container.as_mut().unwrap();
        container.env = vec![
            EnvVar { name: "NAME".into(), value: "you".into() },
            EnvVar { name: "GREETING".into(), value: "hello-$(NAME)".into() },
            EnvVar { name: "PORT".into(), value: "1".into() },
        ];
        container.working_dir = "/proc".into();
        let (running, answer) = bench.serve(&assignment).await;
        let port = if bench.docker { "8080".to_owned() } else { running.address.port().to_string() };
        has(&answer, &format!("args=on {port} hello-you $(X)"));
        for line in ["cwd=/proc", "K_SERVICE=iris", "K_REVISION=iris-00001", "CUDA_VISIBLE_DEVICES=-1"] {
            has(&answer, line);
        }
        has(&answer, &format!("PORT={port}"));
        assert_ne!(running.pid, 0);
        Prober::new(Probe::default(), &running, Arc::clone(&bench.runtime)).ask().await.unwrap();
        bench.log(&running.replica, "listening\n").await;
        bench.end(&running).await;
    }
}

#[tokio::test]
async fn ends_are_reported_as_they_were() {
    for bench in Bench::all().await {
        let (killed, _) = bench.serve(&bench.assignment("killed", &[])).await;
        assert!(Command::new("kill").args(["-9", &killed.pid.to_string()]).status().unwrap().success());
        let exit = tokio::time::timeout(DEADLINE, bench.runtime.exited(&killed)).await.expect("it ends");
        // Engines tell a signal as a code of 128 and its number, besides.
        assert_eq!((exit.signal, exit.code), (Some(9), bench.docker.then_some(137)));
        bench.end(&killed).await;
        for code in [0, 7] {
            let args = ["exit", &code.to_string()];
            let running = bench.start(&bench.assignment("ends", &args)).await.unwrap();
            let exit = tokio::time::timeout(DEADLINE, bench.runtime.exited(&running)).await.expect("it ends");
            assert_eq!((exit.code, exit.signal, exit.oom_killed), (Some(code), None, false));
            bench.log(&running.replica, &format!("args {}", args.join(" "))).await;
            let again = bench.start(&running.assignment).await.unwrap();
            tokio::time::timeout(DEADLINE, bench.runtime.exited(&again)).await.expect("it ends again");
            bench.end(&again).await;
        }
    }
}

#[tokio::test]
async fn open_ports_are_known_and_a_later_agent_finds_the_address_that_was_recorded() {
    for mut bench in Bench::all().await {
        let (mut running, _) = bench.serve(&bench.assignment("ports", &[])).await;
        let inside = if bench.docker { 8080 } else { running.address.port() };
        let listeners = bench.runtime.listeners(&running).await.unwrap();
        assert_eq!(listeners.iter().map(|listener| listener.port()).collect::<Vec<_>>(), [inside]);
        if !bench.docker {
            running.address = "[::1]:8000".parse().unwrap();
        }
        bench.runtime.record_address(&running).unwrap();
        assert_eq!(bench.anew().await, std::slice::from_ref(&running), "docker: {}", bench.docker);
        bench.end(&running).await;
    }
}

#[tokio::test]
async fn output_of_the_previous_run_and_of_ended_replicas_is_kept() {
    for mut bench in Bench::all().await {
        let mut assignment = bench.assignment("output", &["exit", "1"]);
        let run = async |bench: &Bench, assignment: &ReplicaAssignment| {
            let running = bench.start(assignment).await.unwrap();
            tokio::time::timeout(DEADLINE, bench.runtime.exited(&running)).await.expect("it ends");
            bench.runtime.flush_output(&running.replica).await;
        };
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).ok();
        let replica = assignment.replica.clone();
        run(&bench, &assignment).await;
        assert_eq!(read(bench.runtime.log_file(&replica)).unwrap(), "args exit 1\n");
        assert_eq!(read(bench.runtime.previous_log_file(&replica)), None);
        for code in ["2", "3"] {
            assignment.container.as_mut().unwrap().args[1] = code.into();
            run(&bench, &assignment).await;
        }
        assert_eq!(last_lines(&bench.runtime.log_file(&replica)), ["args exit 3"]);
        assert_eq!(read(bench.runtime.previous_log_file(&replica)).unwrap(), "args exit 2\n");

        // It is removed while its agent is away.
        assert_eq!(bench.anew().await, []);
        bench.runtime.remove_others(&|_| false);
        let ended = EndedLogs::new(bench.data.path()).of_service("default", "iris");
        let ended: Vec<_> = ended.into_iter().map(|log| (log.replica, read(log.path).unwrap())).collect();
        assert_eq!(ended, [(replica, "args exit 3\n".to_owned())], "docker: {}", bench.docker);
        assert_eq!(EndedLogs::new(bench.data.path()).of_service("default", "other"), []);
    }
}

#[tokio::test]
async fn a_stop_is_polite_first_and_then_a_kill() {
    for bench in Bench::all().await {
        let (polite, _) = bench.serve(&bench.assignment("polite", &[])).await;
        let exited = bench.runtime.exited(&polite);
        let (exit, ()) = tokio::join!(exited, bench.runtime.stop(&polite, DEADLINE));
        assert_eq!(exit.code, Some(3), "it ended by itself");
        bench.runtime.remove(&polite.replica).await;

        let (stubborn, _) = bench.serve(&bench.assignment("stubborn", &["stubborn"])).await;
        let exited = bench.runtime.exited(&stubborn);
        let (exit, ()) = tokio::join!(exited, bench.runtime.stop(&stubborn, NO_GRACE));
        assert_eq!(exit.signal, Some(9));
        bench.runtime.remove(&stubborn.replica).await;
    }
}

#[tokio::test]
async fn a_later_agent_finds_what_runs_and_removal_leaves_nothing() {
    for mut bench in Bench::all().await {
        let (running, _) = bench.serve(&bench.assignment("adopt", &[])).await;
        bench.log(&running.replica, "listening\n").await;
        let adopted = bench.anew().await;
        assert_eq!(adopted, std::slice::from_ref(&running));
        answer(&adopted[0]).await;
        let log = bench.log(&running.replica, "listening\n").await;
        bench.runtime.stop(&adopted[0], DEADLINE).await;
        let after = std::fs::read_to_string(bench.runtime.log_file(&running.replica)).unwrap();
        assert_eq!(after, log, "nothing is told twice");
        bench.runtime.remove(&running.replica).await;
        assert!(!bench.runtime.log_file(&running.replica).parent().unwrap().exists());
        assert_eq!(bench.anew().await, []);
        if bench.docker {
            assert_eq!(of(&running.replica), [""; 0]);
        }
    }
}

#[tokio::test]
async fn what_lacks_a_secret_is_refused_and_leaves_nothing() {
    for bench in Bench::all().await {
        let mut assignment = bench.assignment("unresolved", &[]);
        assignment.container.as_mut().unwrap().unresolved = "Secret default/s is not there".into();
        let error = bench.start(&assignment).await.unwrap_err();
        assert_eq!(error.reason(), "CreateContainerConfigError");
        assert!(error.to_string().contains("Secret default/s"), "{error}");
    }
}

#[tokio::test]
async fn commands_are_run_where_the_replica_runs() {
    for bench in Bench::all().await {
        let (running, _) = bench.serve(&bench.assignment("exec", &[])).await;
        let program = running.assignment.container.as_ref().unwrap().command[0].clone();
        let probe = |word: &str| Probe {
            handler: Some(Handler::Exec(pilotlight_proto::fleet::v1::Exec {
                command: vec![program.clone(), "check".into(), word.into()],
            })),
            timeout: prost_types::Duration::try_from(DEADLINE).ok(),
            ..Default::default()
        };
        Prober::new(probe("good"), &running, Arc::clone(&bench.runtime)).ask().await.unwrap();
        let error = Prober::new(probe("bad"), &running, Arc::clone(&bench.runtime)).ask().await.unwrap_err();
        assert!(error.contains('9'), "{error}");
        bench.end(&running).await;
    }
}

#[tokio::test]
async fn one_that_is_connected_to_answers() {
    for bench in Bench::all().await {
        let running = bench.start(&bench.assignment("late", &["late", "2"])).await.unwrap();
        let prober = Prober::new(Probe::default(), &running, Arc::clone(&bench.runtime));
        eventually("it is ready", || async { prober.ask().await.ok() }).await;
        has(&ask(&running).await.unwrap(), "args=late 2");
        bench.end(&running).await;
    }
}

#[tokio::test]
async fn one_that_is_paused_answers_nothing_until_it_goes_on() {
    for bench in Bench::all().await {
        let (running, _) = bench.serve(&bench.assignment("paused", &[])).await;
        bench.runtime.pause(&running).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_millis(500), ask(&running)).await;
        assert!(answer.is_err(), "{answer:?}");
        bench.runtime.resume(&running).await.unwrap();
        ask(&running).await.unwrap();
        // A paused one hears a polite stop.
        bench.runtime.pause(&running).await.unwrap();
        let exited = bench.runtime.exited(&running);
        let (exit, ()) = tokio::join!(exited, bench.runtime.stop(&running, DEADLINE));
        assert_eq!(exit.code, Some(3));
        bench.runtime.remove(&running.replica).await;
    }
}

/// Puts it to sleep as the reconciler does.
async fn put_to_sleep(bench: &Bench, running: &Running, paths: Option<&SleepPaths>) {
    let mark = |settled| SleepMark { paths: paths.cloned(), settled };
    bench.runtime.mark_sleep(&running.replica, Some(&mark(false))).unwrap();
    let slept = fall_asleep(&*bench.runtime, running, paths, DEADLINE).await.unwrap();
    assert_eq!(slept.holds_gpu_memory, paths.is_none());
    bench.runtime.mark_sleep(&running.replica, Some(&mark(true))).unwrap();
}

#[tokio::test]
async fn a_sleeper_is_found_by_a_later_agent_woken_twice_and_stopped_in_its_sleep() {
    // A server that takes every path and says nothing of sleep: its word is taken.
    let [sleep, wake_up] = ["/sleep", "/wake_up"].map(str::to_owned);
    let own = SleepPaths { sleep, wake: wake_up, is_sleeping: String::new() };
    for paths in [None, Some(own)] {
        for mut bench in Bench::all().await {
            let (running, _) = bench.serve(&bench.assignment("sleeper", &[])).await;
            assert_eq!(bench.runtime.sleep_mark(&running.replica), None);
            put_to_sleep(&bench, &running, paths.as_ref()).await;
            // Again does no harm.
            put_to_sleep(&bench, &running, paths.as_ref()).await;
            let memory = bench.runtime.memory(&running).await;
            assert!((64 << 10..1 << 30).contains(&memory), "docker: {}: {memory} bytes", bench.docker);

            let adopted = bench.anew().await;
            assert_eq!(adopted, std::slice::from_ref(&running));
            let mark = bench.runtime.sleep_mark(&running.replica);
            assert_eq!(mark, Some(SleepMark { paths: paths.clone(), settled: true }));
            let exited = tokio::time::timeout(Duration::from_millis(300), bench.runtime.exited(&running)).await;
            assert!(exited.is_err(), "it lives: {exited:?}");
            for _ in 0..2 {
                wake(&*bench.runtime, &running, paths.as_ref(), DEADLINE).await.unwrap();
            }
            bench.runtime.mark_sleep(&running.replica, None).unwrap();
            ask(&running).await.unwrap();

            put_to_sleep(&bench, &running, paths.as_ref()).await;
            let exited = bench.runtime.exited(&running);
            let (_, ()) = tokio::join!(exited, bench.runtime.stop(&running, DEADLINE));
            let error = wake(&*bench.runtime, &running, paths.as_ref(), DEADLINE).await.unwrap_err().to_string();
            assert!(error.contains(if paths.is_some() { "/wake_up" } else { "cannot resume" }), "{error}");
            bench.runtime.remove(&running.replica).await;
            assert_eq!(bench.runtime.sleep_mark(&running.replica), None);
            assert_eq!(bench.anew().await, []);
        }
    }
}

#[tokio::test]
async fn a_models_folder_is_seen_where_the_manifest_says() {
    for bench in Bench::all().await {
        let model = tempfile::tempdir().unwrap();
        std::fs::write(model.path().join("weights"), "w").unwrap();
        let mount = Mount { source: model.path().to_owned(), target: "/mnt/models".into(), read_only: true };
        let assignment = bench.assignment("model", &["look", "/mnt/models/weights"]);
        bench.runtime.prepare(&assignment, &|_| {}).await.unwrap();
        let running = bench.runtime.start(&assignment, &[mount]).await.unwrap();
        let exit = tokio::time::timeout(DEADLINE, bench.runtime.exited(&running)).await.expect("it ends");
        assert_eq!(exit.code, Some(0), "docker: {}", bench.docker);
        bench.end(&running).await;
    }
}

#[tokio::test]
async fn too_much_memory_is_told_as_such() {
    let Some(bench) = Bench::docker().await else { return };
    let mut assignment = bench.assignment("oom", &["eat"]);
    assignment.container.as_mut().unwrap().limits = Some(Limits { cpu_millis: 500, memory_bytes: 64 << 20 });
    let running = bench.start(&assignment).await.unwrap();
    let exit = tokio::time::timeout(DEADLINE, bench.runtime.exited(&running)).await.expect("it ends");
    assert!(exit.oom_killed && exit.signal == Some(9), "{exit:?}");
    bench.end(&running).await;
}

#[tokio::test]
async fn a_container_is_given_no_more_than_asked_for() {
    let Some(bench) = Bench::docker().await else { return };
    let (plain, open) = bench.serve(&bench.assignment("open", &[])).await;
    has(&open, "CapEff:\t0000000000000000");
    has(&open, "NoNewPrivs:\t1");
    has(&open, "written=true");
    bench.end(&plain).await;

    let mut assignment = bench.assignment("closed", &[]);
    let files = Files { files: [("token".to_owned(), b"hunter2".to_vec())].into() };
    let volume = |name: &str, source| Volume { name: name.into(), source: Some(source), ..Default::default() };
    assignment.volumes = vec![
        volume("shm", Source::EmptyDir(EmptyDir { memory: true, size_limit: 123 << 20 })),
        volume("secret", Source::Files(files)),
    ];
    let container = assignment.container.as_mut().unwrap();
    let mount =
        |volume: &str, path: &str| VolumeMount { volume: volume.into(), path: path.into(), ..Default::default() };
    container.mounts = vec![mount("shm", "/dev/shm"), mount("secret", "/secret")];
    container.security = Some(SecurityContext {
        run_as_user: Some(4321),
        run_as_group: Some(1234),
        run_as_non_root: true,
        read_only_root_filesystem: true,
        ..Default::default()
    });
    let (running, answer) = bench.serve(&assignment).await;
    for line in ["written=false", "Uid:\t4321\t4321\t4321\t4321", "Gid:\t1234\t1234\t1234\t1234", "secret=hunter2"] {
        has(&answer, line);
    }
    let shm = answer.lines().find(|line| line.contains(" /dev/shm ")).expect("shared memory");
    assert!(shm.contains("size=125952k"), "{shm}");
    bench.end(&running).await;
}

#[tokio::test]
async fn what_cannot_run_is_told_by_kubernetes_reasons() {
    let Some(bench) = Bench::docker().await else { return };
    let reason = async |change: &dyn Fn(&mut ContainerSpec)| {
        let mut assignment = bench.assignment("refused", &[]);
        change(assignment.container.as_mut().unwrap());
        let error = bench.start(&assignment).await.unwrap_err();
        assert_eq!(of(&assignment.replica), [""; 0], "nothing is left of it");
        error.reason()
    };
    assert_eq!(reason(&|c| c.image = "Not A Name".into()).await, "InvalidImageName");
    let never = |c: &mut ContainerSpec| (c.image, c.image_pull_policy) = ("none:1".into(), "Never".into());
    assert_eq!(reason(&never).await, "ErrImageNeverPull");
    // A registry that refuses connections.
    assert_eq!(reason(&|c| c.image = "127.0.0.1:1/none:1".into()).await, "ErrImagePull");
    assert_eq!(reason(&|c| c.command = vec!["/none".into()]).await, "ContainerCannotRun");
    let non_root = SecurityContext { run_as_non_root: true, ..Default::default() };
    assert_eq!(reason(&|c| c.security = Some(non_root.clone())).await, "CreateContainerConfigError");
}

#[tokio::test]
async fn a_kill_between_create_and_start_leaks_nothing_and_others_are_left_alone() {
    let Some(mut bench) = Bench::docker().await else { return };
    let other = Bench::docker().await.unwrap();
    let (theirs, _) = other.serve(&other.assignment("theirs", &[])).await;
    let (ours, _) = bench.serve(&bench.assignment("ours", &[])).await;
    let scope = Command::new("docker")
        .args([
            "inspect",
            ours.container.as_deref().unwrap(),
            "--format",
            "{{index .Config.Labels \"pilotlight.dev/scope\"}}",
        ])
        .output()
        .unwrap();
    let scope = format!("pilotlight.dev/scope={}", String::from_utf8(scope.stdout).unwrap().trim());
    // Created and never started; and started by an agent whose record is lost.
    for (replica, verb) in [("created", "create"), ("lost", "run")] {
        let detach: &[&str] = if verb == "run" { &["-d"] } else { &[] };
        let label = format!("pilotlight.dev/replica={replica}");
        let made = Command::new("docker")
            .arg(verb)
            .args(detach)
            .args(["--label", &scope, "--label", &label, "--env", "PORT=8080", IMAGE])
            .output();
        let made = made.unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let adopted = bench.anew().await;
    assert_eq!(adopted.iter().map(|running| &running.replica).collect::<Vec<_>>(), [&ours.replica]);
    assert_eq!((of("created"), of("lost")), (vec![], vec![]));
    assert!(!of(&theirs.replica).is_empty());
    bench.end(&adopted[0]).await;
    other.end(&theirs).await;
}
