"""A transformer made with KServe's own SDK, as its users write them: names in, names out.

Takes the arguments that KServe's controller gives: --model_name, --predictor_host, --http_port.
"""

import argparse

from kserve import Model, ModelServer, model_server
from kserve.model import PredictorConfig

FEATURES = ["sepal length", "sepal width", "petal length", "petal width"]
SPECIES = ["setosa", "versicolor", "virginica"]


class Names(Model):
    def __init__(self, name, predictor_config):
        super().__init__(name, predictor_config)
        self.ready = True

    def preprocess(self, payload, *_):
        return {"instances": [[flower[name] for name in FEATURES] for flower in payload["instances"]]}

    def postprocess(self, response, *_):
        return {"predictions": [SPECIES[number] for number in response["predictions"]]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[model_server.parser], conflict_handler="resolve")
    arguments, _ = parser.parse_known_args()
    config = PredictorConfig(arguments.predictor_host, arguments.predictor_protocol)
    ModelServer().start([Names(arguments.model_name, config)])
