//! What the coordinator is told of the models and images on this node. Pure.

use pilotlight_proto::fleet::v1 as fleet;

/// True where a report says something that the last one did not. Pages come and go all the time: their
/// bytes count where they move by more than a hundredth of the model, or to the whole of it, or away from it.
pub(super) fn worth_telling(last: &fleet::CacheReport, next: &fleet::CacheReport) -> bool {
    if last.models.len() != next.models.len() || last.images != next.images || last.failures != next.failures {
        return true;
    }
    last.models.iter().zip(&next.models).any(|(last, next)| {
        let whole = |model: &fleet::CachedModel| model.resident_bytes == model.bytes;
        let moved = last.resident_bytes.abs_diff(next.resident_bytes);
        let same = fleet::CachedModel { resident_bytes: last.resident_bytes, ..next.clone() };
        *last != same || whole(last) != whole(next) || moved > next.bytes / 100
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(resident_bytes: u64, staged: bool) -> fleet::CacheReport {
        let model = fleet::CachedModel { bytes: 1000, resident_bytes, staged, ..Default::default() };
        fleet::CacheReport { models: vec![model], ..Default::default() }
    }

    #[test]
    fn few_pages_are_not_worth_telling() {
        let tells = |from: u64, to: u64| worth_telling(&report(from, true), &report(to, true));
        assert!(!tells(500, 500) && !tells(500, 510) && !tells(500, 490));
        assert!(tells(500, 511) && tells(500, 489));
        assert!(tells(999, 1000) && tells(1000, 999));
        assert!(worth_telling(&report(500, true), &report(500, false)));
        assert!(worth_telling(&report(500, true), &fleet::CacheReport::default()));
    }
}
