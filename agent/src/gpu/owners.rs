//! Which replica a process that uses a GPU belongs to.
//!
//! The driver names processes by their ids on the host. An agent that runs in a container with process ids of its own
//! finds none of them: all GPU memory then counts as held by others.

use std::{collections::BTreeMap, ffi::OsStr};

/// Processes above a process that are looked at.
const MAX_ANCESTORS: usize = 32;
/// The variable by which the process runtime marks replicas.
const MARK: &str = "PILOTLIGHT_REPLICA";

/// What `/proc` says of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Id of its parent.
    pub(super) parent: u32,
    /// Id of its session.
    pub(super) session: u32,
    /// Its control group; empty if unknown.
    pub(super) cgroup: String,
    /// The replica that its environment names.
    pub(super) mark: Option<String>,
    /// Name of its program.
    pub(super) name: String,
}

/// Reads the facts of a process; `None` if it is gone.
pub(super) fn facts(pid: u32) -> Option<Facts> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    let stat = process.stat().ok()?;
    let groups = process.cgroups().map(|groups| groups.0).unwrap_or_default();
    // Version 2 has one hierarchy, number 0; version 1 has the devices' one.
    let of_devices = |group: &&procfs::ProcessCGroup| group.controllers.iter().any(|name| name == "devices");
    let group = groups.iter().find(of_devices).or_else(|| groups.iter().find(|group| group.hierarchy == 0));
    let mark = process.environ().ok().and_then(|variables| variables.get(OsStr::new(MARK))?.clone().into_string().ok());
    Some(Facts {
        parent: u32::try_from(stat.ppid).unwrap_or(0),
        session: u32::try_from(stat.session).unwrap_or(0),
        cgroup: group.map(|group| group.pathname.clone()).unwrap_or_default(),
        mark,
        name: stat.comm,
    })
}

/// The replica that a process belongs to: it is the replica's main process, descends from it, is in its session or in its
/// container's control group, or bears its mark. `replicas` are replicas by the id of their main process.
pub(super) fn owner(
    pid: u32,
    replicas: &BTreeMap<u32, String>,
    own_cgroup: &str,
    facts: &impl Fn(u32) -> Option<Facts>,
) -> Option<String> {
    if let Some(replica) = replicas.get(&pid) {
        return Some(replica.clone());
    }
    let process = facts(pid)?;
    if let Some(replica) = replicas.get(&process.session) {
        return Some(replica.clone());
    }
    if let Some(replica) = process.mark.as_ref().and_then(|mark| replicas.values().find(|replica| *replica == mark)) {
        return Some(replica.clone());
    }
    let mut parent = process.parent;
    for _ in 0..MAX_ANCESTORS {
        if let Some(replica) = replicas.get(&parent) {
            return Some(replica.clone());
        }
        if parent <= 1 {
            break;
        }
        parent = facts(parent).map_or(0, |facts| facts.parent);
    }
    // Replicas that are processes are in the agent's own group.
    if process.cgroup.len() <= 1 || process.cgroup == own_cgroup {
        return None;
    }
    let in_its_group = |main: &u32| facts(*main).is_some_and(|main| main.cgroup == process.cgroup);
    replicas.iter().find(|(main, _)| in_its_group(main)).map(|(_, replica)| replica.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_belongs_to_a_replica_by_descent_session_mark_or_control_group() {
        let process = |parent, session, cgroup: &str, mark: Option<&str>| Facts {
            parent,
            session,
            cgroup: cgroup.into(),
            mark: mark.map(str::to_owned),
            name: "python".into(),
        };
        let (agent, container) = ("/system.slice/agent", "/docker/abc");
        let all = BTreeMap::from([
            (100, process(1, 100, agent, Some("a"))),
            (101, process(100, 101, agent, None)),
            (102, process(101, 102, agent, None)),
            (103, process(1, 100, agent, None)),
            (104, process(1, 104, agent, Some("a"))),
            (200, process(50, 200, container, None)),
            (201, process(50, 201, container, None)),
            (300, process(1, 300, agent, None)),
            (301, process(1, 301, agent, Some("gone"))),
            (302, process(1, 302, "/docker/other", None)),
            (303, process(1, 303, "/", None)),
        ]);
        let replicas = BTreeMap::from([(100, "a".to_owned()), (200, "b".to_owned())]);
        let owner = |pid| owner(pid, &replicas, agent, &|pid| all.get(&pid).cloned());
        for (pid, expected) in [
            (100, Some("a")),
            (101, Some("a")),
            (102, Some("a")),
            (103, Some("a")),
            (104, Some("a")),
            (200, Some("b")),
            (201, Some("b")),
            (300, None),
            (301, None),
            (302, None),
            (303, None),
            (999, None),
        ] {
            assert_eq!(owner(pid).as_deref(), expected, "{pid}");
        }
    }

    #[test]
    fn the_facts_of_a_real_process_are_read() {
        let mut child = std::process::Command::new("sleep").arg("60").env(MARK, "me").spawn().unwrap();
        let found = facts(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.parent, std::process::id());
        assert_eq!(facts(child.id()), None);
        // Its program may not have replaced the test's yet.
        assert!(found.mark.is_none_or(|mark| mark == "me"));
    }
}
