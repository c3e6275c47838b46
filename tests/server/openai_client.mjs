// OpenAI's Node client against the server at argv[2]; prints what it got as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "abc" }];
const asked = { model: "tiny", messages, temperature: 1.3, seed: 5, max_tokens: 30 };
const got = {};

const whole = await client.chat.completions.create({ ...asked, n: 3, stop: ["z"] });
got.texts = whole.choices.map((choice) => choice.message.content);
got.ends = whole.choices.map((choice) => choice.finish_reason);

got.streamed = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
  got.streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) got.usage = chunk.usage.completion_tokens;
}

const scored = { ...asked, logprobs: true, top_logprobs: 1 };
got.scored = (await client.chat.completions.create(scored)).choices[0].logprobs.content.length;

got.errors = [];
for (const wrong of [{ model: "gpt" }, { temperature: -1 }, { store: true }]) {
  try {
    await client.chat.completions.create({ ...asked, ...wrong });
  } catch (error) {
    got.errors.push([error.status, error.param]);
  }
}

const left = await client.chat.completions.create({ ...asked, max_tokens: 1500, stream: true });
for await (const chunk of left) break;

console.log(JSON.stringify(got));
