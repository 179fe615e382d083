//! TCP sockets on which a replica's processes listen, as the kernel lists them.

use std::{collections::HashSet, net::SocketAddr};

use procfs::{
    net::TcpState,
    process::{FDTarget, Process, all_processes},
};

/// A listening socket: its address and inode.
type Listening = (SocketAddr, u64);

/// Addresses on which processes of a group listen, sorted. Those of processes that this one may not look into are
/// missing.
pub(super) fn of_group(group: u32) -> Vec<SocketAddr> {
    let of_group = |process: &Process| process.stat().is_ok_and(|stat| u32::try_from(stat.pgrp) == Ok(group));
    let processes = all_processes().into_iter().flatten().flatten().filter(of_group);
    let inodes: HashSet<u64> = processes.flat_map(|process| inodes_of(&process)).collect();
    // They share this process's network.
    let listening = listening(std::process::id()).into_iter().filter(|(_, inode)| inodes.contains(inode));
    sorted(listening.map(|(address, _)| address))
}

/// Addresses on which anything listens in the network of this process, sorted.
pub(super) fn of_network(pid: u32) -> Vec<SocketAddr> {
    sorted(listening(pid).into_iter().map(|(address, _)| address))
}

fn sorted(addresses: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut addresses: Vec<_> = addresses.collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// All listening sockets in the network of this process.
fn listening(pid: u32) -> Vec<Listening> {
    let process = i32::try_from(pid).ok().and_then(|pid| Process::new(pid).ok());
    let tables = process.map(|process| [process.tcp(), process.tcp6()]);
    let sockets = tables.into_iter().flatten().flatten().flatten();
    let listening = sockets.filter(|socket| socket.state == TcpState::Listen);
    listening.map(|socket| (socket.local_address, socket.inode)).collect()
}

/// Inodes of a process's open sockets.
fn inodes_of(process: &Process) -> Vec<u64> {
    let socket = |target: FDTarget| match target {
        FDTarget::Socket(inode) => Some(inode),
        _ => None,
    };
    process.fd().into_iter().flatten().flatten().filter_map(|fd| socket(fd.target)).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn listening_sockets_are_those_of_the_group_and_no_connections() {
        let group = nix::unistd::getpgrp().as_raw() as u32;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let connected = TcpStream::connect(address).unwrap();
        let own = of_group(group);
        assert!(own.contains(&address) && !own.contains(&connected.local_addr().unwrap()), "{own:?}");
        assert!(of_network(std::process::id()).contains(&address));
        // No process of this group has it open any more.
        drop(listener);
        assert!(!of_group(group).contains(&address));
        assert_eq!(of_group(0), []);
    }
}
