// Where the chat service is, how to speak with it, and one call through it. The variables are those of the other clients.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos/", import.meta.url));
const DEFAULT_PORT = 50051;
const CHAT_OFFSET = 1;
const DEFAULT_TIMEOUT_S = 600;
const MAX_TIMEOUT_S = 86_400;

export class SettingsError extends Error {}

/** {address, token, ca, tls, timeoutS}: flags first, then the environment, then the defaults. */
export function resolveSettings(flags, environment) {
  const caFile = flags["ca-cert"] ?? environment.SLIPSTREAM_CA_CERT;
  return {
    address: flags.address ?? environment.SLIPSTREAM_CHAT_ADDRESS ?? besideInference(environment.SLIPSTREAM_ADDRESS),
    token: token(flags["token-file"], environment),
    tls: flags.tls || Boolean(caFile) || ["1", "true"].includes(environment.SLIPSTREAM_TLS?.toLowerCase()),
    ca: caFile ? read(caFile) : null,
    timeoutS: timeout(flags["timeout-s"] ?? environment.SLIPSTREAM_TIMEOUT_S),
  };
}

/** The service as `streamComplete(request)`, which returns the call: an async iterable of responses. */
export function openChat(settings) {
  const definition = protoLoader.loadSync("slipstream/chat/v1/chat_service.proto", {
    includeDirs: [PROTOS],
    keepCase: true,
    enums: String,
    longs: String,
    defaults: true,
    oneofs: true,
  });
  const { ChatService } = grpc.loadPackageDefinition(definition).slipstream.chat.v1;
  const credentials = settings.tls ? grpc.credentials.createSsl(settings.ca) : grpc.credentials.createInsecure();
  const client = new ChatService(settings.address, credentials);
  return {
    streamComplete(request) {
      const metadata = new grpc.Metadata();
      if (settings.token) metadata.set("authorization", `Bearer ${settings.token}`);
      return client.StreamComplete(request, metadata, { deadline: Date.now() + settings.timeoutS * 1000 });
    },
    close: () => client.close(),
  };
}

/** SLIPSTREAM_ADDRESS is that of inference, HOST or HOST:PORT; chat is on the next port. */
function besideInference(base = "127.0.0.1") {
  const [, host, port] = /^(.+?)(?::(\d+))?$/.exec(base.includes("]") || base.split(":").length <= 2 ? base : "") ?? [];
  if (!host) throw new SettingsError(`SLIPSTREAM_ADDRESS: ${JSON.stringify(base)} is not HOST or HOST:PORT`);
  return `${host}:${Number(port ?? DEFAULT_PORT) + CHAT_OFFSET}`;
}

/** The first word of the first line of a token file that is no comment, as the services read it. */
function token(file, environment) {
  if (!file && environment.SLIPSTREAM_TOKEN) return environment.SLIPSTREAM_TOKEN.trim();
  const chosen = file ?? environment.SLIPSTREAM_TOKEN_FILE;
  if (!chosen) return "";
  const lines = read(chosen).toString("utf8").split("\n");
  const found = lines.map((line) => line.trim()).find((line) => line !== "" && !line.startsWith("#"));
  if (!found) throw new SettingsError(`${JSON.stringify(chosen)} holds no token`);
  return found.split(/\s+/)[0];
}

function read(file) {
  try {
    return readFileSync(file);
  } catch (error) {
    throw new SettingsError(`${JSON.stringify(file)} cannot be read: ${error.code}`);
  }
}

function timeout(text) {
  const seconds = text ? Number(text) : DEFAULT_TIMEOUT_S;
  if (seconds > 0 && seconds <= MAX_TIMEOUT_S) return seconds;
  throw new SettingsError(`timeout: ${JSON.stringify(text)} is not above 0 and at most ${MAX_TIMEOUT_S} seconds`);
}
