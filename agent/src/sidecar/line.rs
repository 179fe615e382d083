//! The line for one revision's slots on this node: requests that wait here, and slots that other gateways want, in
//! order of arrival.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::slots::GatewayId;

/// A place in the line. Lower places are served first; a place is never used twice.
pub(super) type Place = i64;

/// Requests (`W`) and claims of other gateways. All operations take logarithmic time.
#[derive(Debug)]
pub(super) struct Line<W> {
    waiters: BTreeMap<Place, W>,
    claims: BTreeMap<Place, Claim>,
    gateways: HashMap<GatewayId, Claims>,
    front: Place,
    back: Place,
}

/// Consecutive slots that one gateway wants.
#[derive(Debug)]
struct Claim {
    gateway: GatewayId,
    /// At least 1.
    count: u64,
}

/// All claims of one gateway.
#[derive(Debug, Default)]
struct Claims {
    /// Slots in all.
    count: u64,
    /// Places of its claims, oldest first.
    places: VecDeque<Place>,
}

/// Who is served next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A request that waits here.
    Waiter,
    /// Another node's gateway.
    Gateway(GatewayId),
}

impl<W> Default for Line<W> {
    fn default() -> Self {
        Self { waiters: BTreeMap::new(), claims: BTreeMap::new(), gateways: HashMap::new(), front: 0, back: 0 }
    }
}

impl<W> Line<W> {
    /// Requests that wait here.
    pub(super) fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// Adds a request at the end, or at the head if it has waited before.
    pub(super) fn enter(&mut self, waiter: W, at_head: bool) -> Place {
        let place = if at_head {
            self.front -= 1;
            self.front
        } else {
            self.back += 1;
            self.back
        };
        self.waiters.insert(place, waiter);
        place
    }

    /// Removes a request that no longer waits; `None` if it was served already.
    pub(super) fn leave(&mut self, place: Place) -> Option<W> {
        self.waiters.remove(&place)
    }

    /// Removes and returns the oldest request that waits here.
    pub(super) fn pop_waiter(&mut self) -> Option<W> {
        self.waiters.pop_first().map(|(_, waiter)| waiter)
    }

    /// Who is served next.
    pub(super) fn next(&self) -> Option<Next> {
        let waiter = self.waiters.first_key_value().map(|(place, _)| *place);
        let claim = self.claims.first_key_value().map(|(place, claim)| (*place, claim.gateway));
        match (waiter, claim) {
            (None, None) => None,
            (Some(waiter), Some((claim, gateway))) if claim < waiter => Some(Next::Gateway(gateway)),
            (Some(_), _) => Some(Next::Waiter),
            (None, Some((_, gateway))) => Some(Next::Gateway(gateway)),
        }
    }

    /// Takes one slot off the oldest claim of a gateway.
    pub(super) fn pop_claim(&mut self, gateway: GatewayId) {
        let Some(claims) = self.gateways.get_mut(&gateway) else { return };
        let Some(place) = claims.places.front().copied() else { return };
        claims.count -= 1;
        if let Some(claim) = self.claims.get_mut(&place) {
            claim.count -= 1;
            if claim.count > 0 {
                return;
            }
        }
        claims.places.pop_front();
        self.claims.remove(&place);
    }

    /// Makes a gateway's claims `wanted` slots in all. Additional ones go to the end; surplus ones are taken from
    /// the end, because the older ones have waited longer.
    pub(super) fn claim(&mut self, gateway: GatewayId, wanted: u64) {
        let have = self.gateways.get(&gateway).map_or(0, |claims| claims.count);
        if wanted > have {
            self.add_claims(gateway, wanted - have);
        } else {
            self.drop_claims(gateway, have - wanted);
        }
    }

    fn add_claims(&mut self, gateway: GatewayId, count: u64) {
        let claims = self.gateways.entry(gateway).or_default();
        claims.count += count;
        let newest = claims.places.back().copied().filter(|place| *place == self.back);
        if let Some(claim) = newest.and_then(|place| self.claims.get_mut(&place)) {
            claim.count += count;
            return;
        }
        self.back += 1;
        claims.places.push_back(self.back);
        self.claims.insert(self.back, Claim { gateway, count });
    }

    fn drop_claims(&mut self, gateway: GatewayId, mut surplus: u64) {
        let Some(claims) = self.gateways.get_mut(&gateway) else { return };
        claims.count -= surplus;
        while surplus > 0 {
            let Some(place) = claims.places.back().copied() else { return };
            let Some(claim) = self.claims.get_mut(&place) else { return };
            if claim.count > surplus {
                claim.count -= surplus;
                return;
            }
            surplus -= claim.count;
            self.claims.remove(&place);
            claims.places.pop_back();
        }
    }

    /// Removes a gateway with all its claims.
    pub(super) fn remove_gateway(&mut self, gateway: GatewayId) {
        for place in self.gateways.remove(&gateway).unwrap_or_default().places {
            self.claims.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_claims_are_served_in_order_of_arrival() {
        let mut line = Line::default();
        line.enter('a', false);
        line.claim(7, 2);
        let b = line.enter('b', false);
        line.claim(7, 3);
        line.claim(8, 1);
        line.enter('c', true);
        let mut served = String::new();
        assert_eq!(line.leave(b), Some('b'));
        assert_eq!(line.leave(b), None, "it has left");
        while let Some(next) = line.next() {
            match next {
                Next::Waiter => served.extend(line.pop_waiter()),
                Next::Gateway(gateway) => {
                    line.pop_claim(gateway);
                    served.push_str(&gateway.to_string());
                }
            }
        }
        assert_eq!(served, "ca7778");
    }

    #[test]
    fn surplus_claims_leave_from_the_end_and_leave_nothing_behind() {
        let mut line = Line::default();
        line.claim(7, 2);
        line.enter('a', false);
        line.claim(7, 5);
        line.claim(7, 1);
        assert_eq!((line.gateways[&7].count, line.next()), (1, Some(Next::Gateway(7))), "the oldest is kept");
        line.pop_claim(7);
        assert_eq!(line.next(), Some(Next::Waiter));
        line.claim(7, 3);
        line.remove_gateway(7);
        line.pop_waiter();
        assert_eq!(line.next(), None);
        assert!(line.claims.is_empty() && line.gateways.is_empty());
    }
}
