"""The only room that speaks gRPC: the server kit, and one thin folder per service on top of it.

What the folders and the command line use of the kit:

    server.Mount                a servicer, its ``add_XServicer_to_server``, and its readiness
    server.open_server          ``async with open_server([Mount(...)], ListenConfig()) as server``: in tests
    service_runner.Service      name, mounts, background coroutines, metrics registry
    service_runner.run_service  serves until SIGTERM and returns the exit code; ``announce`` prints the SERVING line
    request_context             ``caller()``, ``deadline_monotonic_s(context)``, ``remaining_s()`` of the call in hand
    channels.open_channel       a channel to another service: token, request id and deadline travel on
    status                      the table exception -> status; a servicer never calls it

How a servicer is written: subclass the generated base class; methods are ``async def``, or async generators where the
response streams. Convert, call the room, convert back. Raise the classes of ``slipstream_server.errors``, never
``context.abort``; whatever else is raised becomes INTERNAL with an id. Do not catch ``asyncio.CancelledError`` without
raising it again: it means that the client left, the deadline passed, or the drain's grace ended. Methods that are not
overridden answer UNIMPLEMENTED. Do not send initial metadata: the kit does, with ``x-request-id``. Methods whose name
begins with ``Watch`` are ended by a drain at once; all others may finish.
"""
