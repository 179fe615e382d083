"""Asks an iris service through Pilotlight's gateway, as users of other people's clients would.

    iris.py CLIENT PORT SERVICE

CLIENT is a key of CLIENTS below, PORT the gateway's on loopback, SERVICE a name in the namespace default. Prints
the classes of the three flowers below as JSON. One client per process: KServe's and Triton's Python packages
register the same protobuf messages, which one process cannot have twice.
"""

import asyncio
import json
import sys

# A setosa (0), a versicolor (1) and a virginica (2).
FLOWERS = [[5.1, 3.5, 1.4, 0.2], [6.0, 2.7, 4.2, 1.3], [6.3, 3.3, 6.0, 2.5]]
# Seconds. No expectation: waking a service may take long on a busy machine.
PATIENCE = 300


def triton_http(port, service, binary):
    """By path: the prefix is part of the client's URL."""
    import numpy
    from tritonclient import http

    url = f"127.0.0.1:{port}/serving/default/{service}"
    client = http.InferenceServerClient(url, connection_timeout=PATIENCE, network_timeout=PATIENCE)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("iris")
    assert client.get_model_metadata("iris")["inputs"][0]["shape"] == [-1, 4]
    tensor = http.InferInput("input-0", [3, 4], "FP64")
    tensor.set_data_from_numpy(numpy.array(FLOWERS), binary_data=binary)
    outputs = [http.InferRequestedOutput("predict", binary_data=binary)]
    answer = client.infer("iris", [tensor], outputs=outputs, request_id="seven")
    assert answer.get_response()["id"] == "seven", answer.get_response()
    return answer.as_numpy("predict").flatten().tolist()


def triton_grpc(port, service):
    """By host: gRPC's paths are fixed, so the service is named by the authority."""
    import numpy
    from tritonclient import grpc

    authority = ("grpc.default_authority", f"{service}.default.localhost")
    client = grpc.InferenceServerClient(f"127.0.0.1:{port}", channel_args=[authority])
    assert client.is_server_live(client_timeout=PATIENCE)
    assert client.is_server_ready() and client.is_model_ready("iris")
    assert list(client.get_model_metadata("iris").inputs[0].shape) == [-1, 4]
    tensor = grpc.InferInput("input-0", [3, 4], "FP32")
    tensor.set_data_from_numpy(numpy.array(FLOWERS, dtype=numpy.float32))
    outputs = [grpc.InferRequestedOutput("output-0"), grpc.InferRequestedOutput("predict_proba")]
    answer = client.infer("iris", [tensor], outputs=outputs, request_id="seven", client_timeout=PATIENCE)
    assert answer.get_response().id == "seven", answer.get_response()
    classes = answer.as_numpy("output-0").tolist()
    assert answer.as_numpy("predict_proba").argmax(axis=1).tolist() == classes
    # The server's refusal arrives as it was given: trailers pass the gateway.
    try:
        client.infer("rose", [tensor], client_timeout=PATIENCE)
    except grpc.InferenceServerException as error:
        assert error.status() == "StatusCode.NOT_FOUND" and "rose" in error.message(), error
    else:
        raise AssertionError("there is no model rose")
    return classes


async def kserve_grpc(port, service):
    from kserve import InferInput, InferRequest, InferenceGRPCClient

    authority = ("grpc.default_authority", f"{service}.default.localhost")
    tensor = InferInput("input-0", [3, 4], "FP64", data=[number for flower in FLOWERS for number in flower])
    request = InferRequest(model_name="iris", infer_inputs=[tensor])
    async with InferenceGRPCClient(f"127.0.0.1:{port}", channel_args=[authority], timeout=PATIENCE) as client:
        assert await client.is_server_ready(timeout=PATIENCE) and await client.is_model_ready("iris")
        answer = await client.infer(request)
    return list(answer.outputs[0].data)


async def kserve_rest(protocol, port, service):
    """V1 by host, V2 by path."""
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol=protocol, timeout=PATIENCE))
    root = f"http://127.0.0.1:{port}"
    try:
        if protocol == "v1":
            headers = {"Host": f"{service}.default.localhost"}
            answer = await client.infer(root, {"instances": FLOWERS}, model_name="iris", headers=headers)
            assert await client.is_model_ready(root, "iris", headers=headers)
            return answer["predictions"]
        base = f"{root}/serving/default/{service}"
        tensor = InferInput("input-0", [3, 4], "FP64", data=FLOWERS)
        request = InferRequest(model_name="iris", infer_inputs=[tensor], request_id="seven")
        answer = await client.infer(base, request, model_name="iris")
        assert await client.is_server_ready(base) and await client.is_model_ready(base, "iris")
        assert answer.id == "seven", answer
        return list(answer.outputs[0].data)
    finally:
        await client.close()


CLIENTS = {
    "tritonclient.http": lambda *to: triton_http(*to, binary=True),
    "tritonclient.http-json": lambda *to: triton_http(*to, binary=False),
    "tritonclient.grpc": triton_grpc,
    "kserve-v1": lambda *to: asyncio.run(kserve_rest("v1", *to)),
    "kserve-v2": lambda *to: asyncio.run(kserve_rest("v2", *to)),
    "kserve-grpc": lambda *to: asyncio.run(kserve_grpc(*to)),
}

if __name__ == "__main__":
    name, port, service = sys.argv[1:]
    print(json.dumps([int(flower) for flower in CLIENTS[name](port, service)]))
