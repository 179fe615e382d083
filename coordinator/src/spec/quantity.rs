//! Kubernetes quantities: `200m`, `3`, `0.1`, `2Gi`, `500M`, `1e3`.
//!
//! The grammar is that of `k8s.io/apimachinery/pkg/api/resource.Quantity`; a fraction that does not
//! come out even is rounded up, as there.

/// Why a quantity was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with one of the known suffixes.
    #[error("must be a number with an optional suffix m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei or an exponent")]
    Malformed,
    /// Below zero.
    #[error("must not be negative")]
    Negative,
    /// Over 2^63-1 units.
    #[error("must be at most 2^63-1")]
    TooLarge,
}

/// Thousandths of the quantity's unit, rounded up: CPU `0.1` and `100m` are 100.
pub fn millis(text: &str) -> Result<u64, QuantityError> {
    parse(text, 1000)
}

/// Whole units, rounded up: memory `2Ki` is 2048.
pub fn units(text: &str) -> Result<u64, QuantityError> {
    parse(text, 1)
}

fn parse(text: &str, scale: u128) -> Result<u64, QuantityError> {
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || fraction.contains('.') {
        return Err(QuantityError::Malformed);
    }
    let fraction = fraction.trim_end_matches('0');
    let (multiplier, exponent) = suffix_of(suffix).ok_or(QuantityError::Malformed)?;
    let exponent = exponent.saturating_sub(i32::try_from(fraction.len()).map_err(|_| QuantityError::TooLarge)?);

    let digits = format!("{whole}{fraction}");
    let mantissa: u128 = match digits.trim_start_matches('0') {
        "" => return Ok(0),
        significant => significant.parse().map_err(|_| QuantityError::TooLarge)?,
    };
    if negative {
        return Err(QuantityError::Negative);
    }
    let value = mantissa.checked_mul(multiplier * scale).ok_or(QuantityError::TooLarge)?;
    let power = 10u128.checked_pow(exponent.unsigned_abs());
    let value = match (exponent < 0, power) {
        (false, Some(power)) => value.checked_mul(power).ok_or(QuantityError::TooLarge)?,
        (false, None) => return Err(QuantityError::TooLarge),
        (true, Some(power)) => value.div_ceil(power),
        (true, None) => 1,
    };
    u64::try_from(value).ok().filter(|value| *value <= i64::MAX as u64).ok_or(QuantityError::TooLarge)
}

/// Multiplier and power of ten of a suffix.
fn suffix_of(suffix: &str) -> Option<(u128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => (1, suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|e: &i32| (-99..=99).contains(e))?),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_every_suffix() {
        assert_eq!(millis("200m"), Ok(200));
        assert_eq!(millis("3"), Ok(3000));
        assert_eq!(millis("0.1"), Ok(100));
        assert_eq!(millis(".5"), Ok(500));
        assert_eq!(millis("2."), Ok(2000));
        assert_eq!(millis("1e3"), Ok(1_000_000));
        assert_eq!(units("2Gi"), Ok(2 << 30));
        assert_eq!(units("1.5Gi"), Ok(3 << 29));
        assert_eq!(units("500M"), Ok(500_000_000));
        assert_eq!(units("128974848"), Ok(128_974_848));
        assert_eq!(units("1E"), Ok(1_000_000_000_000_000_000));
        assert_eq!(units("1E3"), Ok(1000));
        assert_eq!(units("12e-1"), Ok(2), "1.2 is rounded up");
        assert_eq!(units("1e-90"), Ok(1), "never rounded down to nothing");
        assert_eq!(units("0e-90"), Ok(0));
        assert_eq!(millis("1u"), Ok(1));
        assert_eq!(units("+4"), Ok(4));
    }

    #[test]
    fn refuses_what_is_no_quantity() {
        for text in ["", ".", "m", "1.2.3", "2gi", "2 Gi", "1e", "1e+-3", "0x10", "٣", "1e100", "nan", "--1", "Gi2"] {
            assert_eq!(units(text), Err(QuantityError::Malformed), "{text:?}");
        }
        assert_eq!(units("-1"), Err(QuantityError::Negative));
        assert_eq!(units("-0"), Ok(0));
        for text in ["8Ei", "1e90", "9223372036854775808", "1000000000000000000000000000000000000000000"] {
            assert_eq!(units(text), Err(QuantityError::TooLarge), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,60}", number in "[-+]?[0-9.]{0,50}(e|E|m|Ki|Ei|e-)?[0-9]{0,12}") {
            let _ = (units(&text), millis(&text), units(&number), millis(&number));
        }

        #[test]
        fn millis_round_trip(value in 0u64..1 << 50) {
            prop_assert_eq!(millis(&format!("{value}m")), Ok(value));
            prop_assert_eq!(units(&format!("{value}m")), Ok(value.div_ceil(1000)));
        }
    }
}
