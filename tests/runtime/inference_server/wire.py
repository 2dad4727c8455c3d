"""A gRPC endpoint in front of the stand-in, so that the client that people use talks to it as to the server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from tests.runtime.inference_server.stand_in import Request, Response, Sender, Server, Tensor, check


class Endpoint(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Streams of requests to the models of a stand-in, one request after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for asked in requests:
            config = self.server.configs[asked.model_name]
            responses = SimpleQueue[Response | None]()
            sender = Sender(config, lambda sent: not context.is_active())
            sender.told = responses.put
            request = Request(received(asked, config), [each.name for each in config.output], sender)
            model = self.server.models[asked.model_name]
            thread = Thread(
                target=lambda model=model, request=request, put=responses.put: (model.execute([request]), put(None))
            )
            thread.start()
            while (response := responses.get()) is not None:
                yield streamed(asked, response)
            thread.join()


def received(asked: Any, config: Any) -> list[Tensor]:
    """The inputs of a message, refused as the server would refuse them."""
    tensors = []
    for spec, raw in zip(asked.inputs, asked.raw_input_contents, strict=True):
        if spec.datatype == "BYTES":
            array = deserialize_bytes_tensor(raw).reshape(list(spec.shape))
        else:
            array = np.frombuffer(raw, triton_to_np_dtype(spec.datatype)).reshape(list(spec.shape))
        check(spec.name, array, config.input)
        tensors.append(Tensor(spec.name, array))
    return tensors


def streamed(asked: Any, response: Response) -> Any:
    """A response as a message."""
    if (error := response.error()) is not None:
        return service_pb2.ModelStreamInferResponse(error_message=error.message())
    found = service_pb2.ModelInferResponse(model_name=asked.model_name, id=asked.id)
    for name, array in response.arrays().items():
        kind = "BYTES" if array.dtype == np.object_ else {"uint8": "UINT8", "int32": "INT32"}[str(array.dtype)]
        found.outputs.add(name=name, datatype=kind, shape=array.shape)
        raw = serialize_byte_tensor(array).item() if kind == "BYTES" else array.tobytes()
        found.raw_output_contents.append(raw)
    return service_pb2.ModelStreamInferResponse(infer_response=found)


@contextmanager
def endpoint(server: Server) -> Iterator[str]:
    """Serve the models of a stand-in. Yields the address."""
    grpc_server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Endpoint(server), grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        grpc_server.stop(0).wait()
