//! What the engine is told to create. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bollard::models::{
    ContainerCreateBody, DeviceRequest, HostConfig, HostConfigLogConfig, Mount, PortBinding, ResourcesUlimits,
};
use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment, SecurityContext, probe::Handler};

use super::{
    super::{
        expand::expand,
        variables::{variables, visible_devices},
    },
    GpuMode, RuntimeError,
};

/// Serving port of a container that declares none, as in KServe and Knative.
const PORT: u16 = 8080;
/// Processes and threads of one container; far above what servers use.
const PIDS_MOST: i64 = 32_768;
/// Open files of one process.
const FILES_MOST: i64 = 1_048_576;
/// Stack of a thread, bytes; what NVIDIA's images ask for.
const STACK_MOST: i64 = 67_108_864;
/// Shared memory where there is neither volume nor memory limit, bytes; Docker's own default.
const SHM_LEAST: u64 = 64 << 20;
/// What the engine keeps of output; the replica's log file is filled from there.
const LOG_SIZE: &str = "10m";
/// Longest host name, bytes.
const HOST_NAME_MOST: usize = 63;

/// Capabilities that a manifest may add; others would open the node.
pub(super) const CAPABILITIES: [&str; 15] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
    "SYS_NICE",
];

/// The engine and node that a container is made for.
#[derive(Debug, Clone)]
pub(super) struct Place<'a> {
    /// Network of the engine.
    pub(super) network: &'a str,
    /// How GPUs are asked for.
    pub(super) gpu_mode: GpuMode,
    /// UUID by index. Empty where GPUs are made up.
    pub(super) gpus: &'a BTreeMap<u32, String>,
    /// True: it is Podman, which knows fewer options of logs.
    pub(super) podman: bool,
    /// False where the engine may not raise limits of processes.
    pub(super) ulimits: bool,
}

/// What a container is made of, beside its assignment.
#[derive(Debug, Clone, Default)]
pub(super) struct Parts {
    /// Id of the image.
    pub(super) image: String,
    /// The image's own user.
    pub(super) image_user: String,
    /// In the order they are made.
    pub(super) mounts: Vec<Mount>,
    /// By a volume; 0 and `None` are the default.
    pub(super) shm_size: Option<u64>,
    /// What it is found again by.
    pub(super) labels: HashMap<String, String>,
}

/// The serving port in the container.
pub(super) fn serving_port(container: &ContainerSpec) -> u16 {
    u16::try_from(container.port).ok().filter(|port| *port != 0).unwrap_or(PORT)
}

/// Ports of the container that the agent connects to: for requests and for probes.
pub(super) fn ports(container: &ContainerSpec) -> BTreeSet<u16> {
    let probes = [&container.readiness_probe, &container.liveness_probe, &container.startup_probe];
    let probed = probes.into_iter().flatten().filter_map(|probe| match probe.handler.as_ref()? {
        Handler::HttpGet(get) => Some(get.port),
        Handler::TcpSocket(tcp) => Some(tcp.port),
        Handler::Grpc(grpc) => Some(grpc.port),
        Handler::Exec(_) => None,
    });
    let probed = probed.filter_map(|port| u16::try_from(port).ok().filter(|port| *port != 0));
    [serving_port(container)].into_iter().chain(probed).collect()
}

/// The container of the replica.
pub(super) fn body(
    assignment: &ReplicaAssignment,
    container: &ContainerSpec,
    parts: Parts,
    place: &Place<'_>,
) -> Result<ContainerCreateBody, RuntimeError> {
    let variables = variables(assignment, container, &decided(assignment, container, place));
    let words = |words: &[String]| -> Option<Vec<String>> {
        (!words.is_empty()).then(|| words.iter().map(|word| expand(word, &variables)).collect())
    };
    let security = container.security.clone().unwrap_or_default();
    Ok(ContainerCreateBody {
        hostname: Some(host_name(&assignment.replica)),
        user: user(&security, &parts.image_user)?,
        exposed_ports: Some(ports(container).iter().map(|port| format!("{port}/tcp")).collect()),
        env: Some(variables.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        entrypoint: words(&container.command),
        cmd: words(&container.args),
        working_dir: Some(container.working_dir.clone()).filter(|directory| !directory.is_empty()),
        image: Some(parts.image),
        labels: Some(parts.labels),
        host_config: Some(host_config(assignment, container, &security, parts.mounts, parts.shm_size, place)?),
        ..ContainerCreateBody::default()
    })
}

/// Variables that are not the manifest's to change.
fn decided(
    assignment: &ReplicaAssignment,
    container: &ContainerSpec,
    place: &Place<'_>,
) -> Vec<(&'static str, String)> {
    let mut decided = vec![("PORT", serving_port(container).to_string())];
    let has_gpus = !assignment.gpu_indices.is_empty() || !assignment.mig_devices.is_empty();
    match (has_gpus, place.gpus.is_empty()) {
        // The container sees its own GPUs only, numbered from 0; the engine says which they are.
        (true, false) if place.gpu_mode == GpuMode::DeviceRequest => {}
        // By CDI, NVIDIA's runtime must not add any itself.
        (true, false) => decided.push(("NVIDIA_VISIBLE_DEVICES", "void".to_owned())),
        // An image may ask for all GPUs where NVIDIA's runtime is the engine's default.
        _ => decided.extend([
            ("NVIDIA_VISIBLE_DEVICES", "void".to_owned()),
            ("CUDA_VISIBLE_DEVICES", visible_devices(assignment)),
        ]),
    }
    decided
}

fn host_config(
    assignment: &ReplicaAssignment,
    container: &ContainerSpec,
    security: &SecurityContext,
    mounts: Vec<Mount>,
    shm_size: Option<u64>,
    place: &Place<'_>,
) -> Result<HostConfig, RuntimeError> {
    let limits = container.limits.unwrap_or_default();
    let amount = |amount: u64| i64::try_from(amount).ok().filter(|amount| *amount > 0);
    let shm = shm_size.filter(|size| *size > 0).unwrap_or((limits.memory_bytes / 2).max(SHM_LEAST));
    let bindings = ports(container).into_iter().map(|port| {
        // Port 0 asks for any that is free.
        let binding = PortBinding { host_ip: Some("127.0.0.1".to_owned()), host_port: Some("0".to_owned()) };
        (format!("{port}/tcp"), Some(vec![binding]))
    });
    let groups: Vec<_> = security.supplemental_groups.iter().map(ToString::to_string).collect();
    Ok(HostConfig {
        network_mode: Some(place.network.to_owned()),
        port_bindings: Some(bindings.collect()),
        mounts: Some(mounts),
        memory: amount(limits.memory_bytes),
        // The same as memory: nothing is swapped.
        memory_swap: amount(limits.memory_bytes),
        nano_cpus: amount(limits.cpu_millis.saturating_mul(1_000_000)),
        pids_limit: Some(PIDS_MOST),
        ulimits: place
            .ulimits
            .then(|| vec![ulimit("memlock", -1), ulimit("nofile", FILES_MOST), ulimit("stack", STACK_MOST)]),
        shm_size: amount(shm),
        privileged: Some(false),
        readonly_rootfs: Some(security.read_only_root_filesystem),
        cap_drop: Some(vec!["ALL".to_owned()]),
        cap_add: Some(capabilities(security)?),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        group_add: (!groups.is_empty()).then_some(groups),
        device_requests: device_requests(assignment, place)?,
        log_config: Some(log_config(place.podman)),
        ..HostConfig::default()
    })
}

fn ulimit(name: &str, most: i64) -> ResourcesUlimits {
    ResourcesUlimits { name: Some(name.to_owned()), soft: Some(most), hard: Some(most) }
}

fn log_config(podman: bool) -> HostConfigLogConfig {
    let mut config = HashMap::from([("max-size".to_owned(), LOG_SIZE.to_owned())]);
    if !podman {
        config.insert("max-file".to_owned(), "2".to_owned());
    }
    HostConfigLogConfig { typ: Some("json-file".to_owned()), config: Some(config) }
}

fn capabilities(security: &SecurityContext) -> Result<Vec<String>, RuntimeError> {
    if let Some(bad) = security.add_capabilities.iter().find(|name| !CAPABILITIES.contains(&name.as_str())) {
        return Err(RuntimeError::Specification {
            field: "securityContext.capabilities.add",
            reason: format!("{bad:?} is not allowed; allowed are: {}", CAPABILITIES.join(", ")),
        });
    }
    Ok(security.add_capabilities.clone())
}

/// `--gpus` semantics: the replica's GPUs or MIG devices by UUID, and no others.
fn device_requests(
    assignment: &ReplicaAssignment,
    place: &Place<'_>,
) -> Result<Option<Vec<DeviceRequest>>, RuntimeError> {
    let wanted = !assignment.gpu_indices.is_empty() || !assignment.mig_devices.is_empty();
    // Where GPUs are made up there is nothing to give.
    if !wanted || place.gpus.is_empty() {
        return Ok(None);
    }
    let ids: Vec<String> = if assignment.mig_devices.is_empty() {
        let uuid = |index: &u32| {
            place.gpus.get(index).cloned().ok_or_else(|| RuntimeError::Specification {
                field: "gpus",
                reason: format!("this node has no GPU {index}"),
            })
        };
        assignment.gpu_indices.iter().map(uuid).collect::<Result<_, _>>()?
    } else {
        assignment.mig_devices.clone()
    };
    Ok(Some(vec![match place.gpu_mode {
        GpuMode::DeviceRequest => DeviceRequest {
            driver: Some("nvidia".to_owned()),
            device_ids: Some(ids),
            capabilities: Some(vec![vec!["gpu".to_owned()]]),
            ..DeviceRequest::default()
        },
        GpuMode::Cdi => DeviceRequest {
            driver: Some("cdi".to_owned()),
            device_ids: Some(ids.iter().map(|id| format!("nvidia.com/gpu={id}")).collect()),
            ..DeviceRequest::default()
        },
    }]))
}

/// Whom the container runs as; `None` is whom the image says.
fn user(security: &SecurityContext, image_user: &str) -> Result<Option<String>, RuntimeError> {
    let own = image_user.split(':').next().unwrap_or_default();
    let refuse = |reason: String| Err(RuntimeError::Specification { field: "securityContext.runAsNonRoot", reason });
    if security.run_as_non_root {
        match security.run_as_user.map(|user| user.to_string()).as_deref().unwrap_or(own) {
            "" | "0" | "root" => return refuse("true, and the image would run as root; set runAsUser".to_owned()),
            user if user.parse::<u32>().is_err() => {
                return refuse(format!(
                    "true, and the image's user {user:?} is no number, so it may be root; set runAsUser"
                ));
            }
            _ => {}
        }
    }
    Ok(match (security.run_as_user, security.run_as_group) {
        (Some(user), Some(group)) => Some(format!("{user}:{group}")),
        (Some(user), None) => Some(user.to_string()),
        (None, Some(group)) => Some(format!("{}:{group}", if own.is_empty() { "0" } else { own })),
        (None, None) => None,
    })
}

/// The number of the user that the container runs as, where known.
pub(super) fn user_number(security: Option<&SecurityContext>, image_user: &str) -> Option<u32> {
    let given = security.and_then(|security| security.run_as_user);
    given.or_else(|| match image_user.split(':').next().unwrap_or_default() {
        "" | "root" => Some(0),
        user => user.parse().ok(),
    })
}

fn host_name(replica: &str) -> String {
    let start = replica.len().saturating_sub(HOST_NAME_MOST);
    replica.get(start..).unwrap_or(replica).trim_start_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use pilotlight_proto::fleet::v1::{EnvVar, HttpGet, Limits, Probe};

    use super::*;

    fn gpus() -> BTreeMap<u32, String> {
        BTreeMap::from([(0, "GPU-a".to_owned()), (1, "GPU-b".to_owned())])
    }

    fn made(
        assignment: &ReplicaAssignment,
        container: &ContainerSpec,
        image_user: &str,
        gpu_mode: GpuMode,
    ) -> Result<ContainerCreateBody, String> {
        let gpus = gpus();
        let place = Place { network: "bridge", gpu_mode, gpus: &gpus, podman: false, ulimits: true };
        let parts = Parts { image: "sha256:1".into(), image_user: image_user.into(), ..Parts::default() };
        body(assignment, container, parts, &place).map_err(|error| error.to_string())
    }

    fn secured(security: SecurityContext, image_user: &str) -> Result<ContainerCreateBody, String> {
        let container = ContainerSpec { security: Some(security), ..Default::default() };
        made(&ReplicaAssignment::default(), &container, image_user, GpuMode::DeviceRequest)
    }

    #[test]
    fn nothing_is_allowed_unless_it_is_asked_for() {
        let made = secured(SecurityContext::default(), "").unwrap();
        let host = made.host_config.unwrap();
        assert_eq!((host.cap_drop.unwrap(), host.cap_add.unwrap()), (vec!["ALL".to_owned()], vec![]));
        assert_eq!(host.security_opt.unwrap(), ["no-new-privileges"]);
        assert_eq!(host.privileged, Some(false));
        let asked = SecurityContext {
            read_only_root_filesystem: true,
            add_capabilities: vec!["CHOWN".into()],
            ..Default::default()
        };
        let host = secured(asked, "").unwrap().host_config.unwrap();
        assert_eq!((host.readonly_rootfs, host.cap_add.unwrap()), (Some(true), vec!["CHOWN".to_owned()]));
        let too_much = SecurityContext { add_capabilities: vec!["SYS_ADMIN".into()], ..Default::default() };
        assert!(secured(too_much, "").unwrap_err().contains("\"SYS_ADMIN\" is not allowed; allowed are: AUDIT_WRITE"));
    }

    #[test]
    fn root_is_refused_where_it_is_not_wanted() {
        let non_root = |user| SecurityContext { run_as_non_root: true, run_as_user: user, ..Default::default() };
        for image in ["", "0", "root", "0:5"] {
            assert!(secured(non_root(None), image).unwrap_err().contains("would run as root"), "{image}");
        }
        assert!(secured(non_root(None), "app").unwrap_err().contains("is no number"));
        assert!(secured(non_root(Some(0)), "1000").is_err());
        assert_eq!(secured(non_root(None), "1000:1000").unwrap().user, None);
        assert_eq!(secured(non_root(Some(7)), "root").unwrap().user.as_deref(), Some("7"));
        let group = SecurityContext { run_as_group: Some(9), ..Default::default() };
        assert_eq!(secured(group, "app:x").unwrap().user.as_deref(), Some("app:9"));
        assert_eq!(user_number(Some(&non_root(Some(7))), "root"), Some(7));
        assert_eq!((user_number(None, ""), user_number(None, "app")), (Some(0), None));
    }

    #[test]
    fn gpus_are_asked_for_by_their_uuids() {
        let container = ContainerSpec::default();
        let of = |assignment: &ReplicaAssignment, mode| {
            let made = made(assignment, &container, "", mode).unwrap();
            (made.host_config.unwrap().device_requests, made.env.unwrap())
        };
        let one = ReplicaAssignment { gpu_indices: vec![1], ..Default::default() };
        let (requests, env) = of(&one, GpuMode::DeviceRequest);
        let request = &requests.unwrap()[0];
        assert_eq!(request.driver.as_deref(), Some("nvidia"));
        assert_eq!(request.device_ids.as_deref().unwrap(), ["GPU-b"]);
        assert!(!env.iter().any(|var| var.contains("VISIBLE")), "the engine says which: {env:?}");
        let (requests, env) = of(&one, GpuMode::Cdi);
        assert_eq!(requests.unwrap()[0].device_ids.as_deref().unwrap(), ["nvidia.com/gpu=GPU-b"]);
        assert!(env.contains(&"NVIDIA_VISIBLE_DEVICES=void".to_owned()));
        let mig = ReplicaAssignment { gpu_indices: vec![0], mig_devices: vec!["MIG-x".into()], ..Default::default() };
        assert_eq!(of(&mig, GpuMode::DeviceRequest).0.unwrap()[0].device_ids.as_deref().unwrap(), ["MIG-x"]);
        let (requests, env) = of(&ReplicaAssignment::default(), GpuMode::DeviceRequest);
        assert_eq!(requests, None);
        assert!(
            env.contains(&"CUDA_VISIBLE_DEVICES=-1".to_owned())
                && env.contains(&"NVIDIA_VISIBLE_DEVICES=void".to_owned())
        );
        let unknown = ReplicaAssignment { gpu_indices: vec![7], ..Default::default() };
        assert!(made(&unknown, &container, "", GpuMode::Cdi).unwrap_err().contains("no GPU 7"));
    }

    #[test]
    fn commands_ports_and_limits_are_the_manifests() {
        let get = HttpGet { port: 9000, ..Default::default() };
        let container = ContainerSpec {
            args: vec!["--port=$(PORT)".into(), "$(A)".into()],
            env: vec![
                EnvVar { name: "A".into(), value: "p$(PORT)".into() },
                EnvVar { name: "PORT".into(), value: "1".into() },
            ],
            port: 8000,
            readiness_probe: Some(Probe { handler: Some(Handler::HttpGet(get)), ..Default::default() }),
            limits: Some(Limits { cpu_millis: 1500, memory_bytes: 1 << 30 }),
            ..Default::default()
        };
        let made = made(&ReplicaAssignment::default(), &container, "", GpuMode::DeviceRequest).unwrap();
        assert_eq!(made.entrypoint, None, "the image's own");
        assert_eq!(made.cmd.unwrap(), ["--port=8000", "p8000"]);
        assert_eq!(made.exposed_ports.unwrap(), ["8000/tcp", "9000/tcp"]);
        let host = made.host_config.unwrap();
        assert_eq!(host.port_bindings.unwrap().len(), 2);
        assert_eq!(
            (host.memory, host.memory_swap, host.nano_cpus),
            (Some(1 << 30), Some(1 << 30), Some(1_500_000_000))
        );
        assert_eq!(host.shm_size, Some(1 << 29), "half of the memory");
        let none = ContainerSpec::default();
        let host =
            super::tests::made(&ReplicaAssignment::default(), &none, "", GpuMode::Cdi).unwrap().host_config.unwrap();
        assert_eq!((host.memory, host.nano_cpus, host.shm_size), (None, None, Some(64 << 20)));
    }
}
