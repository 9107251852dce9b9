// Streams a chat with a Slipstream service: `node chat.mjs --help`.
//
// The text of the answer goes to stdout as it comes, everything else to stderr. Ctrl-C cancels the answer that is being
// produced, and at the prompt ends the program. Exit codes: 0, 1 for a failed call, 2 for a wrong command line, 130
// when cancelled.

import { createInterface } from "node:readline/promises";
import { parseArgs } from "node:util";

import { openChat, resolveSettings, SettingsError } from "./connection.mjs";
import { describeError, isCancelled } from "./errors.mjs";

const USAGE = `usage: node chat.mjs [FLAGS] [MESSAGE]

Without MESSAGE, every line of stdin is a turn of one conversation.

  --address HOST:PORT     the chat service (SLIPSTREAM_CHAT_ADDRESS; default 127.0.0.1:50052)
  --token-file FILE       file with a bearer token (SLIPSTREAM_TOKEN_FILE; or the token itself in SLIPSTREAM_TOKEN)
  --tls                   speak TLS and trust the system's authorities (SLIPSTREAM_TLS=1)
  --ca-cert FILE          speak TLS and trust this authority, PEM (SLIPSTREAM_CA_CERT)
  --timeout-s SECONDS     the longest an answer may take (SLIPSTREAM_TIMEOUT_S; default 600)
  --model NAME            default: the service's own
  --adapter NAME          as support, support@live or support@v3; default: the model's active one
  --system TEXT           instructions that stand before the conversation
  --max-new-tokens COUNT  default: the model's own
`;

const OPTIONS = {
  address: { type: "string" },
  "token-file": { type: "string" },
  tls: { type: "boolean" },
  "ca-cert": { type: "string" },
  "timeout-s": { type: "string" },
  model: { type: "string", default: "" },
  adapter: { type: "string", default: "" },
  system: { type: "string" },
  "max-new-tokens": { type: "string" },
  help: { type: "boolean", short: "h" },
};

const EXIT_FAILED = 1;
const EXIT_USAGE = 2;
const EXIT_CANCELLED = 130;

/** One conversation, kept here and sent whole with each turn: the service stores nothing. */
class Conversation {
  #chat;
  #flags;
  #messages;
  #call = null;

  constructor(chat, flags) {
    this.#chat = chat;
    this.#flags = flags;
    this.#messages = flags.system ? [{ role: "ROLE_SYSTEM", content: flags.system }] : [];
  }

  /** Cancel the answer that is being produced; false where there is none. */
  cancel() {
    this.#call?.cancel();
    return this.#call !== null;
  }

  /** Say `text`, write the answer as it comes. Rejects with gRPC's error; the turn is then forgotten. */
  async say(text) {
    const messages = [...this.#messages, { role: "ROLE_USER", content: text }];
    let answer = "";
    let finished = null;
    this.#call = this.#chat.streamComplete(this.#request(messages));
    try {
      for await (const response of this.#call) {
        if (response.event === "delta") {
          answer += response.delta.text;
          process.stdout.write(response.delta.text);
        } else if (response.event === "finished") {
          finished = response.finished;
        }
      }
    } finally {
      // Where the loop was left early the service would go on producing.
      this.#call.cancel();
      this.#call = null;
      if (answer !== "") process.stdout.write("\n");
    }
    if (finished === null) throw new Error("the stream ended without its last event");
    this.#messages = [...messages, { role: "ROLE_ASSISTANT", content: answer }];
    return finished;
  }

  #request(messages) {
    const limit = this.#flags["max-new-tokens"];
    const stopping = limit === undefined ? {} : { max_new_tokens: limit };
    return { model: this.#flags.model, adapter: this.#flags.adapter, messages, options: { stopping } };
  }
}

/** One turn, reported; the exit code it would end the program with. */
async function turn(conversation, text) {
  try {
    const { finish_reason, usage } = await conversation.say(text);
    const reason = finish_reason.replace("FINISH_REASON_", "").toLowerCase();
    console.error(`[${reason}: ${usage.prompt_tokens} tokens in, ${usage.completion_tokens} out]`);
    return 0;
  } catch (error) {
    console.error(isCancelled(error) ? "[cancelled]" : describeError(error));
    return isCancelled(error) ? EXIT_CANCELLED : EXIT_FAILED;
  }
}

/** Every line is a turn; a failed one does not end the conversation. The exit code of the last one. */
async function converse(conversation) {
  const lines = createInterface({ input: process.stdin, output: process.stderr, terminal: process.stdin.isTTY });
  // At a terminal readline takes Ctrl-C away from the process.
  lines.on("SIGINT", () => conversation.cancel() || lines.close());
  let exitCode = 0;
  lines.setPrompt("> ");
  if (process.stdin.isTTY) lines.prompt();
  for await (const line of lines) {
    if (line.trim() !== "") exitCode = await turn(conversation, line);
    if (process.stdin.isTTY) lines.prompt();
  }
  return exitCode;
}

async function main() {
  const { values: flags, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  if (flags.help) {
    process.stdout.write(USAGE);
    return 0;
  }
  if (!/^-?\d+$/.test(flags["max-new-tokens"] ?? "0")) throw new SettingsError("--max-new-tokens: not a whole number");
  const chat = openChat(resolveSettings(flags, process.env));
  const conversation = new Conversation(chat, flags);
  process.on("SIGINT", () => conversation.cancel() || process.exit(EXIT_CANCELLED));
  try {
    return positionals.length > 0 ? await turn(conversation, positionals.join(" ")) : await converse(conversation);
  } finally {
    chat.close();
  }
}

try {
  process.exitCode = await main();
} catch (error) {
  if (!(error instanceof SettingsError) && !error.code?.startsWith?.("ERR_PARSE_ARGS")) throw error;
  console.error(`${error.message}\nnode chat.mjs --help lists the flags`);
  process.exitCode = EXIT_USAGE;
}
