//! Which fields a type takes, found by its `Deserialize` implementation, so that a misspelt field can be answered with
//! the name that was probably meant.

use std::cell::Cell;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor, value::Error,
    value::StrDeserializer,
};

/// Least similarity of a suggestion, 0 to 1.
const MIN_SIMILARITY: f64 = 0.85;

/// The field of `T` that `name` is probably a misspelling of. `parents` are the keys from `T` to the struct that does
/// not have `name`; elements of lists have no key.
pub(super) fn suggest<T: DeserializeOwned>(parents: &[&str], name: &str) -> Option<&'static str> {
    let found = Cell::new(None);
    // It always ends with an error: no value is made.
    let _ = T::deserialize(Probe { parents, found: &found });
    closest(found.get()?.iter().copied(), name)
}

/// The most similar of `fields` that is similar enough to be suggested.
pub(super) fn closest(fields: impl IntoIterator<Item = &'static str>, name: &str) -> Option<&'static str> {
    let similarity = |field: &&str| strsim::jaro_winkler(&field.to_lowercase(), &name.to_lowercase());
    let fields = fields.into_iter().filter(|field| *field != name && !field.starts_with('_'));
    let best = fields.max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(&best) >= MIN_SIMILARITY).then_some(best)
}

/// Walks into a type by the keys of `parents`, and notes the fields of the struct that it arrives at.
#[derive(Clone, Copy)]
struct Probe<'p> {
    parents: &'p [&'p str],
    found: &'p Cell<Option<&'static [&'static str]>>,
}

impl<'p> Probe<'p> {
    /// The key to go on with, and the walk after it.
    fn step(self) -> Option<(&'p str, Self)> {
        let (first, rest) = self.parents.split_first()?;
        Some((first, Self { parents: rest, ..self }))
    }
}

fn over() -> Error {
    Error::custom("no value is made")
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.step() {
            None => {
                self.found.set(Some(fields));
                Err(over())
            }
            Some(_) => visitor.visit_map(OneEntry(Some(self))),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(OneEntry(Some(self)))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(OneElement(Some(self)))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(over())
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct enum identifier ignored_any
    }
}

/// A map with the next key.
struct OneEntry<'p>(Option<Probe<'p>>);

impl<'de> MapAccess<'de> for OneEntry<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, _)) = self.0.and_then(Probe::step) else { return Ok(None) };
        seed.deserialize(StrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (_, after) = self.0.take().and_then(Probe::step).ok_or_else(over)?;
        seed.deserialize(after)
    }
}

/// A list with one element.
struct OneElement<'p>(Option<Probe<'p>>);

impl<'de> SeqAccess<'de> for OneElement<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.0.take().map(|probe| seed.deserialize(probe)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::PodSpec;

    use super::suggest;

    #[test]
    fn a_misspelt_field_is_answered_with_the_one_that_was_meant() {
        assert_eq!(suggest::<PodSpec>(&[], "nodeSelecter"), Some("nodeSelector"));
        assert_eq!(suggest::<PodSpec>(&["containers"], "imag"), Some("image"));
        assert_eq!(suggest::<PodSpec>(&["containers", "resources"], "limit"), Some("limits"));
        assert_eq!(suggest::<PodSpec>(&["containers"], "readynessprobe"), Some("readinessProbe"));
    }

    #[test]
    fn a_field_that_is_like_no_other_gets_no_suggestion() {
        assert_eq!(suggest::<PodSpec>(&[], "xyz"), None);
        assert_eq!(suggest::<PodSpec>(&["nowhere"], "imag"), None);
    }
}
