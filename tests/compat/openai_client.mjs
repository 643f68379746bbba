// The official client for JavaScript: models, a chat, a stream, a schema, tools, responses, embeddings, errors.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.env.MODEL;
const messages = [{ role: "user", content: "Name a city." }];
const ask = { model, messages, max_tokens: 8, temperature: 0 };
const parameters = {
  type: "object",
  properties: { name: { enum: ["Rome", "Oslo"] } },
  required: ["name"],
  additionalProperties: false,
};

assert.equal((await client.models.list()).data[0].id, model);
const answer = await client.chat.completions.create(ask);
assert.ok(answer._request_id);

const texts = [];
let usage;
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
  texts.push(chunk.choices[0]?.delta.content ?? "");
  usage = chunk.usage ?? usage;
}
assert.equal(texts.join(""), answer.choices[0].message.content);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);

const schema = { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } };
const parsed = await client.chat.completions.parse({ ...ask, max_tokens: 60, response_format: schema });
assert.ok(["Rome", "Oslo"].includes(parsed.choices[0].message.parsed.name));

const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
const called = await client.chat.completions
  .stream({ ...ask, max_tokens: 200, tools, tool_choice: "required" })
  .finalChatCompletion();
assert.equal(called.choices[0].message.tool_calls[0].function.name, "weather");

const kinds = [];
const stream = client.responses.stream({ model, input: "Hi", max_output_tokens: 16 });
for await (const event of stream) kinds.push(event.type);
assert.equal(kinds[0], "response.created");
assert.ok((await stream.finalResponse()).output_text);

const vectors = await client.embeddings.create({ model, input: ["Rome", "Oslo"] });
assert.ok(vectors.data.length === 2 && vectors.data[0].embedding.length > 100);
await assert.rejects(client.chat.completions.create({ ...ask, temperature: -1 }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ ...ask, model: "none" }), OpenAI.NotFoundError);
