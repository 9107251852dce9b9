// A failed call in words: gRPC's code, Slipstream's reason, the fields that are bad, and whether waiting helps.

import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const TRAILER = "grpc-status-details-bin";
const DETAILS = protoLoader.loadSync(fileURLToPath(new URL("error_details.proto", import.meta.url)), {
  keepCase: true,
  longs: Number,
  defaults: true,
});

export function isCancelled(error) {
  return error.code === grpc.status.CANCELLED;
}

/** `INVALID_ARGUMENT INVALID_FIELD: ...`, a line for each bad field that this does not name yet, one where waiting helps. */
export function describeError(error) {
  if (!(error.code in grpc.status)) return String(error.message ?? error);
  const { info, violations, retryDelayS } = readDetails(error);
  const unnamed = violations.filter(({ description }) => !error.details.includes(description));
  const title = [grpc.status[error.code], info?.reason].filter(Boolean).join(" ");
  return [
    `${title}: ${error.details}`,
    ...unnamed.map(({ field, description }) => `  ${field}: ${description}`),
    ...(retryDelayS === null ? [] : [`  try again after ${retryDelayS} s`]),
  ].join("\n");
}

/** What the google.rpc details of a failed call say: {info, violations, retryDelayS}; empty where it has none. */
export function readDetails(error) {
  const found = { info: null, violations: [], retryDelayS: null };
  for (const { type_url, value } of packedDetails(error)) {
    const name = type_url.split("/").pop();
    if (name === "google.rpc.ErrorInfo") found.info = decode(name, value);
    if (name === "google.rpc.BadRequest") found.violations = decode(name, value).field_violations;
    if (name === "google.rpc.RetryInfo") found.retryDelayS = inSeconds(decode(name, value).retry_delay);
  }
  return found;
}

function packedDetails(error) {
  const [packed] = error.metadata?.get(TRAILER) ?? [];
  if (packed === undefined) return [];
  try {
    return decode("google.rpc.Status", packed).details;
  } catch {
    return []; // a foreign proxy's details are no reason to hide the status itself
  }
}

function decode(name, bytes) {
  return DETAILS[name].deserialize(bytes);
}

function inSeconds(duration) {
  return duration === null ? null : duration.seconds + duration.nanos / 1e9;
}
