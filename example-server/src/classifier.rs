//! The model: multinomial logistic regression on the iris data.

use linfa::traits::{Fit as _, Predict as _};
use linfa_logistic::{MultiFittedLogisticRegression, MultiLogisticRegression};
use ndarray::Array2;

/// What a flower is described by, in centimetres, in this order.
pub const FEATURES: [&str; 4] = ["sepal length", "sepal width", "petal length", "petal width"];

/// L-BFGS converges well before; the limit only bounds the time to start.
const MAX_ITERATIONS: u64 = 500;

/// A fitted classifier: 0 is setosa, 1 versicolor, 2 virginica.
#[derive(Debug)]
pub struct Classifier {
    fitted: MultiFittedLogisticRegression<f64, usize>,
}

/// What the classifier says of some flowers, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The likeliest class of each flower.
    pub classes: Vec<usize>,
    /// Probability of each class, 0 to 1, flower by flower.
    pub probabilities: Vec<f64>,
}

impl Classifier {
    /// Fits the classifier. Takes some milliseconds of CPU; deterministic.
    ///
    /// # Errors
    /// The solver failed.
    pub fn train() -> Result<Self, linfa_logistic::error::Error> {
        let fitted = MultiLogisticRegression::default().max_iterations(MAX_ITERATIONS).fit(&linfa_datasets::iris())?;
        Ok(Self { fitted })
    }

    /// Classifies flowers, one a row.
    pub fn predict(&self, flowers: &Array2<f64>) -> Prediction {
        Prediction {
            classes: self.fitted.predict(flowers).to_vec(),
            probabilities: self.fitted.predict_probabilities(flowers).into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_data_it_was_fitted_to() {
        let data = linfa_datasets::iris();
        let prediction = Classifier::train().unwrap().predict(&data.records);
        let right = prediction.classes.iter().zip(&data.targets).filter(|(said, is)| said == is).count();
        assert!(right >= 145, "only {right} of 150 right");
        assert_eq!(prediction.probabilities.len(), 450);
        for row in prediction.probabilities.chunks(3) {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{row:?}");
        }
    }

    #[test]
    fn classes_are_numbered_as_in_sklearn() {
        let flowers = ndarray::array![[5.1, 3.5, 1.4, 0.2], [6.0, 2.7, 4.2, 1.3], [6.3, 3.3, 6.0, 2.5]];
        assert_eq!(Classifier::train().unwrap().predict(&flowers).classes, [0, 1, 2]);
    }
}
