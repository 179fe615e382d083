//! The tensors that the model takes and gives, as the Open Inference Protocol has them over REST and gRPC.

use ndarray::Array2;
use serde::Serialize;

use crate::{FEATURES, error::Refusal};

const CLASSES: i64 = 3;

/// What is said of a tensor before there is one.
#[derive(Debug, Serialize)]
pub(crate) struct Form {
    pub(crate) name: &'static str,
    pub(crate) datatype: &'static str,
    /// -1 stands for the number of flowers.
    pub(crate) shape: &'static [i64],
    #[serde(skip)]
    pub(crate) content: Content,
}

/// Which part of a prediction a tensor has, or that it is the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Flowers,
    Classes,
    Probabilities,
}

/// The one input; FP32 and INT64 are taken, too, and any name.
pub(crate) const INPUT: Form =
    Form { name: "input-0", datatype: "FP64", shape: &[-1, FEATURES.len() as i64], content: Content::Flowers };

/// The outputs; the first is given where none is asked for. KServe's sklearn server calls its output
/// `output-0`, MLServer calls it `predict`.
pub(crate) const OUTPUTS: [Form; 3] = [
    Form { name: "output-0", datatype: "INT64", shape: &[-1], content: Content::Classes },
    Form { name: "predict", datatype: "INT64", shape: &[-1, 1], content: Content::Classes },
    Form { name: "predict_proba", datatype: "FP64", shape: &[-1, CLASSES], content: Content::Probabilities },
];

impl Form {
    /// The shape for so many flowers.
    pub(crate) fn shape_for(&self, flowers: usize) -> Vec<i64> {
        self.shape.iter().map(|size| if *size < 0 { flowers as i64 } else { *size }).collect()
    }
}

/// The outputs of these names, or the first one.
pub(crate) fn wanted<'a>(names: impl Iterator<Item = &'a str>) -> Result<Vec<&'static Form>, Refusal> {
    let find = |(index, name): (usize, &str)| {
        OUTPUTS.iter().find(|form| form.name == name).ok_or_else(|| {
            let message = format!("expected output-0, predict or predict_proba, got {name:?}");
            Refusal::field(format!("outputs[{index}].name"), message)
        })
    };
    let mut wanted = names.enumerate().map(find).collect::<Result<Vec<_>, _>>()?;
    if wanted.is_empty() {
        wanted.push(&OUTPUTS[0]);
    }
    Ok(wanted)
}

/// A datatype of numbers that the model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Datatype {
    Fp32,
    Fp64,
    Int64,
}

impl Datatype {
    pub(crate) fn parse(datatype: &str, tensor: &str) -> Result<Self, Refusal> {
        match datatype {
            "FP32" => Ok(Self::Fp32),
            "FP64" => Ok(Self::Fp64),
            "INT64" => Ok(Self::Int64),
            other => {
                let message = format!("expected FP32, FP64 or INT64, got {other:?} (tensor {tensor:?})");
                Err(Refusal::field("inputs[0].datatype", message))
            }
        }
    }
}

/// The number of flowers in a tensor of this shape.
pub(crate) fn rows(shape: &[i64]) -> Result<usize, Refusal> {
    let refused = |message| Refusal::field("inputs[0].shape", message);
    let [rows, columns] = *shape else {
        return Err(refused(format!("expected [n, 4], got {shape:?}")));
    };
    match usize::try_from(rows) {
        Ok(count @ 1..) if columns == FEATURES.len() as i64 => Ok(count),
        _ => Err(refused(format!("expected [n, 4] with n of 1 or more, got [{rows}, {columns}]"))),
    }
}

/// The flowers, where there are as many values as `rows` need.
pub(crate) fn flowers(rows: usize, values: Vec<f64>) -> Result<Array2<f64>, Refusal> {
    let refused = |message| Refusal::field("inputs[0].data", message);
    let (columns, got) = (FEATURES.len(), values.len());
    // The product cannot be trusted to fit: the shape comes from the client.
    if rows.checked_mul(columns) != Some(got) {
        return Err(refused(format!("shape [{rows}, {columns}] does not fit {got} values")));
    }
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(refused(format!("expected lengths in centimetres, got {value}")));
    }
    Array2::from_shape_vec((rows, columns), values).map_err(|error| refused(error.to_string()))
}

/// Values given as bytes: little-endian, row by row.
pub(crate) fn raw_values(raw: &[u8], datatype: Datatype, field: &str) -> Result<Vec<f64>, Refusal> {
    match datatype {
        Datatype::Fp32 => numbers(raw, field, |bytes| f32::from_le_bytes(bytes).into()),
        Datatype::Fp64 => numbers(raw, field, f64::from_le_bytes),
        Datatype::Int64 => numbers(raw, field, |bytes| i64::from_le_bytes(bytes) as f64),
    }
}

fn numbers<const N: usize>(raw: &[u8], field: &str, number: impl Fn([u8; N]) -> f64) -> Result<Vec<f64>, Refusal> {
    let (values, rest) = raw.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(Refusal::field(field, format!("expected values of {N} bytes, got {} bytes", raw.len())));
    }
    Ok(values.iter().copied().map(number).collect())
}
