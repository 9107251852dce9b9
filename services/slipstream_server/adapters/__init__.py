"""The registry of adapters: immutable versions, aliases that point at them, and everybody who must hear of a change.

    configuration · inspection · compatibility    what an adapter is and whether it may be kept; no torch
    intake                                        files of an upload -> a checked artifact in the store
    tables · resources                            how it is stored; what callers see
    adapters · versions · aliases · gate · active what can be done, each in one write transaction
    journal                                       every change becomes an event in the transaction that makes it
    watching · resolvers                          who follows the events, and who has put them into force
    housekeeping                                  what expires, and what nothing refers to

Free of grpc, protobuf and torch. The adapters are one shared shelf: everybody who may call the service sees them all,
and ``owner`` says who made what.
"""
