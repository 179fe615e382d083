//! What the engine's answers mean. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr},
};

use bollard::{
    errors::Error,
    models::{ContainerInspectResponse, ContainerMemoryStats, ContainerState, NetworkInspect, PortBinding},
};

use super::super::Exit;

/// True where the engine says that there is no such thing.
pub(super) fn is_missing(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 404, .. })
}

/// Ports of this machine by ports of the container.
pub(super) fn published(found: &ContainerInspectResponse) -> BTreeMap<u16, u16> {
    let ports = found.network_settings.as_ref().and_then(|network| network.ports.clone()).unwrap_or_default();
    let pair = |(inside, bindings): (String, Option<Vec<PortBinding>>)| {
        let outside = bindings?.into_iter().find_map(|binding| binding.host_port?.parse().ok())?;
        Some((inside.split('/').next()?.parse().ok()?, outside))
    };
    ports.into_iter().filter_map(pair).collect()
}

/// The address of this machine in the engine's network: the gateway, or the first of the subnet, which
/// is what engines take where none is named.
pub(super) fn gateway(network: &NetworkInspect) -> Option<IpAddr> {
    let configs = network.ipam.as_ref().and_then(|ipam| ipam.config.as_ref())?;
    configs.iter().find_map(|config| {
        let named = config.gateway.as_ref().and_then(|gateway| gateway.split('/').next()?.parse::<Ipv4Addr>().ok());
        let first = || {
            let (subnet, bits) = config.subnet.as_ref()?.split_once('/')?;
            let mask = u32::MAX.checked_shl(32 - bits.parse::<u32>().ok().filter(|bits| *bits <= 30)?).unwrap_or(0);
            Some(Ipv4Addr::from((u32::from(subnet.parse::<Ipv4Addr>().ok()?) & mask) + 1))
        };
        named.or_else(first).map(IpAddr::V4)
    })
}

/// True where its processes live, paused or not: engines differ in whether a paused one runs.
pub(super) fn lives(state: &ContainerState) -> bool {
    state.running == Some(true) || state.paused == Some(true)
}

/// Bytes that a container's processes have in main memory, by what cgroups of version 2 or 1 count; what
/// of the page cache is only there to be read again is left out. 0 where the engine does not say.
pub(super) fn resident(memory: &ContainerMemoryStats) -> u64 {
    let none = HashMap::new();
    let counts = memory.stats.as_ref().unwrap_or(&none);
    let sum = |names: [&str; 2]| match names.map(|name| counts.get(name)) {
        [Some(own), Some(mapped)] => Some(own + mapped),
        _ => None,
    };
    let counted = sum(["anon", "file_mapped"]).or_else(|| sum(["total_rss", "total_mapped_file"]));
    counted.or(memory.usage).unwrap_or(0)
}

/// How a container ended.
pub(super) fn exit_of(state: &ContainerState) -> Exit {
    let code = state.exit_code.and_then(|code| i32::try_from(code).ok());
    // What shells do, engines do as well: 128 and the signal's number.
    let signal = code.filter(|code| (129..=192).contains(code)).map(|code| code - 128);
    Exit { code, signal, oom_killed: state.oom_killed == Some(true) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_processes_have_and_not_the_page_cache() {
        let stats = |counts: &[(&str, u64)]| ContainerMemoryStats {
            usage: Some(900),
            stats: Some(counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()),
            ..Default::default()
        };
        assert_eq!(resident(&stats(&[("anon", 100), ("file_mapped", 20), ("file", 700)])), 120);
        assert_eq!(resident(&stats(&[("total_rss", 100), ("total_mapped_file", 3), ("rss", 1)])), 103);
        assert_eq!(resident(&stats(&[("anon", 100)])), 900);
        assert_eq!(resident(&ContainerMemoryStats::default()), 0);
    }
}
